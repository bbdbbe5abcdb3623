// Whether anything of a stranger's table runs in the page, or becomes a part of it. Printed as JSON.
// node hostile.mjs < { url, screenshot, prompts: [ graphs in API format ] }

import { readFileSync } from "node:fs";
import { load, open, run } from "./page.mjs";

const request = JSON.parse(readFileSync(0, "utf8"));
const { browser, page, errors } = await open(request.url);
errors.length = 0; // of the front end's start, before there is any table
await page.evaluate(() => {
  window.ran = [];
});
const report = { failures: [] };
for (const prompt of request.prompts) {
  await load(page, { nodes: [], links: [], version: 0.4 });
  await page.evaluate((graph) => window.app.loadApiJson(graph, "hostile"), prompt);
  await page.waitForTimeout(300);
  report.failures.push(await run(page));
  await page.waitForTimeout(1500);
}
report.ran = await page.evaluate(() => window.ran);
report.elements = await page.evaluate(
  () => document.querySelectorAll('img[src="x"], marquee, blink, [onerror]').length,
);
report.said = await page.evaluate(() => document.body.innerText);
report.errors = errors;
await page.screenshot({ path: request.screenshot });
await browser.close();
console.log(JSON.stringify(report));

// Whether anything of a stranger's table runs in the page, or becomes a part of it.

import { load, run } from "./page.mjs";

/** Run graphs in API format. The tables are in the lists that the page has from its start: there they have not run, or
 * `errors` would tell that `ran` is unknown. */
export async function tryHostile(page, errors, prompts) {
  const errorsBefore = errors.length;
  await page.evaluate(() => {
    window.ran = [];
  });
  const failures = [];
  for (const prompt of prompts) {
    await load(page, { nodes: [], links: [], version: 0.4 });
    await page.evaluate((graph) => window.app.loadApiJson(graph, "hostile"), prompt);
    await page.waitForTimeout(300);
    failures.push(await run(page));
    await page.waitForTimeout(1500);
  }
  return {
    failures,
    ran: await page.evaluate(() => window.ran),
    elements: await page.evaluate(
      () => document.querySelectorAll('img[src="x"], marquee, blink, [onerror]').length,
    ),
    errors: errors.slice(errorsBefore),
  };
}

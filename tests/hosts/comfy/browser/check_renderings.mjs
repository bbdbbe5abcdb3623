// One workflow in both renderings: { errors, canvas, vue }, as JSON.
// node check_renderings.mjs < { url, screenshots: folder, workflow, changes: { canvas: …, vue: { type: widgets } } }

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { open } from "./page.mjs";
import { tryRendering } from "./renderings.mjs";

const { url, screenshots, workflow, changes } = JSON.parse(readFileSync(0, "utf8"));
const { browser, page, errors } = await open(url);
const report = { errors };
for (const name of ["canvas", "vue"]) {
  const screenshot = join(screenshots, `${name}.png`);
  report[name] = await tryRendering(page, { vue: name === "vue", workflow, changes: changes[name], screenshot });
}
await browser.close();
console.log(JSON.stringify(report));

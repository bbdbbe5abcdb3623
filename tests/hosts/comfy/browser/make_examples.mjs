// Builds the example workflows on the page, runs them and takes their thumbnails.
// node make_examples.mjs URL FOLDER

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { build, examples } from "./examples.mjs";
import { load, open, photograph, run } from "./page.mjs";

const [url, folder] = process.argv.slice(2);
const { browser, page } = await open(url, { width: 1120, height: 800 });
for (const [name, example] of Object.entries(examples)) {
  const workflow = await build(page, example);
  writeFileSync(join(folder, `${name}.json`), `${JSON.stringify(workflow, null, 1)}\n`);
  await load(page, workflow);
  if (!JSON.stringify(workflow).includes("CheckpointLoaderSimple")) {
    const error = await run(page);
    if (error) throw new Error(`${name}: ${JSON.stringify(error)}`);
  }
  await photograph(page, join(folder, `${name}.jpg`), { type: "jpeg", quality: 88 });
}
await browser.close();

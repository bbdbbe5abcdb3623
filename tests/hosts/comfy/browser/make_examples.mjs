// Builds the example workflows on the page, runs them and photographs them.
// node make_examples.mjs URL FOLDER_OF_WORKFLOWS FOLDER_OF_PICTURES [NAME ...]    # without names, all of them

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { build, examples } from "./examples.mjs";
import { load, open, photograph, run } from "./page.mjs";

const [url, workflows, pictures, ...names] = process.argv.slice(2);
const { browser, page } = await open(url);
for (const name of names.length ? names : Object.keys(examples)) {
  const example = examples[name];
  const workflow = await build(page, example);
  writeFileSync(join(workflows, `${name}.json`), `${JSON.stringify(workflow, null, 1)}\n`);
  await load(page, workflow);
  if (Object.values(example.nodes).some(({ type }) => type === "CheckpointLoaderSimple")) {
    await shrinkOutputs(page);
  } else {
    const failure = await run(page, 900); // however busy the machine is
    if (failure) throw new Error(`${name}: ${JSON.stringify(failure)}`);
  }
  await photograph(page, join(pictures, `${name}.png`));
}
await browser.close();

/** Nodes that wait for a picture, without the room for it: a thumbnail of a graph that was not run. */
async function shrinkOutputs(page) {
  await page.evaluate(() => {
    for (const node of window.app.graph.nodes) {
      if (node.constructor.nodeData?.output_node) node.setSize([node.size[0], node.computeSize()[1]]);
    }
  });
}

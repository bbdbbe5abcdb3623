// What output nodes show once a workflow has run, with nodes drawn on the canvas or by Vue ("Nodes 2.0").

import { load, run, setWidgets, showAll } from "./page.mjs";

/** The setting that has nodes drawn by Vue. */
export const VUE = "Comfy.VueNodes.Enabled";

/** Whether this front end offers that. Where it is unfinished (1.27: core's Preview Image shows nothing), the setting is
 * hidden. */
export async function offersVue(page) {
  return page.evaluate((id) => window.app.ui.settings.settingsLookup[id]?.type === "boolean", VUE);
}

/** Run a workflow as nodes are drawn now. */
export async function tryRendering(page, { vue, workflow, changes }) {
  await load(page, workflow);
  await setWidgets(page, changes);
  const failure = await run(page);
  if (!vue) await showAll(page);
  return { failure, shown: await outputsShown(page, vue) };
}

/** What is shown once no output node is without a picture or shows a preview, or after 8 s: the test tells. The front
 * end drops previews with a delay. */
async function outputsShown(page, vue) {
  const isOutput = (pictures) => pictures.length && pictures.every((src) => !src.startsWith("blob:"));
  const end = Date.now() + 8000;
  for (;;) {
    const last = await page.evaluate(shown, vue);
    if (Date.now() > end || Object.values(last).every(isOutput)) return last;
    await page.waitForTimeout(200);
  }
}

/** The pictures of the output nodes, by type: on the page. */
function shown(vue) {
  window.app.canvas.draw(true, true);
  const pictures = (node) =>
    vue ? [...document.querySelectorAll(`[data-node-id="${node.id}"] img`)] : (node.imgs ?? []);
  const outputs = window.app.graph.nodes.filter((node) => node.constructor.nodeData?.output_node);
  return Object.fromEntries(
    outputs.map((node) => [
      node.type,
      pictures(node)
        .filter((image) => image.naturalWidth)
        .map((image) => image.src),
    ]),
  );
}

// What the browser tests want to know of the page, printed as JSON. All on one page, which takes seconds to load.
// node check.mjs < { url, screenshots: folder or null, workflows: { name: { workflow, changes: { type: widgets } } },
//                    hostile: [ graphs in API format ], renderings: { workflow, changes: { name: … } } }

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { tryHostile } from "./hostile.mjs";
import { load, open, photograph, ready, run, setWidgets, showAll } from "./page.mjs";
import { offersVue, tryRendering, VUE } from "./renderings.mjs";

const request = JSON.parse(readFileSync(0, "utf8"));
const { browser, page, errors } = await open(request.url);
const report = { workflows: {} };
for (const [name, example] of Object.entries(request.workflows)) {
  report.workflows[name] = await tryWorkflow(name, example);
  report.again ??= await runAgain();
}
report.older = await loadOlder(request.workflows);
report.help = await openHelp("DODE_DistillLambdas");
report.hostile = await tryHostile(page, errors, request.hostile);
await keepScreenshot("hostile");
await setPreviews("none");
report.renderings = { "canvas without previews": await rendered("canvas without previews", false) };
const vue = await offersVue(page);
await loadWith({ "Comfy.Locale": "zh", [VUE]: vue });
report.chinese = await namesOfNodes();
report.renderings["vue without previews"] = vue ? await rendered("vue without previews", true) : null;
await setPreviews("latent2rgb");
report.renderings.vue = vue ? await rendered("vue", true) : null;
await setAll({ "Comfy.Locale": "en", [VUE]: false });
report.errors = errors;
await browser.close();
console.log(JSON.stringify(report));

async function keepScreenshot(name, take = (path) => page.screenshot({ path })) {
  if (request.screenshots) await take(join(request.screenshots, `${name}.png`));
}

async function setPreviews(method) {
  const reply = await fetch(`${request.url}/tests/previews`, { method: "POST", body: method });
  if (!reply.ok) throw new Error(`previews: ${reply.status}`);
}

async function rendered(name, isVue) {
  const { workflow, changes } = request.renderings;
  const facts = await tryRendering(page, { vue: isVue, workflow, changes: changes[name] });
  await keepScreenshot(name);
  return facts;
}

async function setAll(settings) {
  for (const setting of Object.entries(settings)) {
    await page.evaluate(([id, value]) => window.app.api.storeSetting(id, value), setting);
  }
}

/** Load the page anew, with other settings. */
async function loadWith(settings) {
  await setAll(settings);
  await page.reload();
  await ready(page);
  await page.waitForTimeout(2000); // the front end opens the graph of before
}

/** Load and run a workflow. */
async function tryWorkflow(name, { workflow, changes }) {
  const errorsBefore = errors.length;
  await load(page, workflow);
  const facts = await page.evaluate(async () => {
    const known = window.LiteGraph.registered_node_types;
    return {
      missing: window.app.graph.nodes.map((node) => node.type).filter((type) => !known[type]),
      prompt: (await window.app.graphToPrompt()).output,
    };
  });
  await setWidgets(page, changes);
  const begun = Date.now();
  await page.evaluate(() => {
    window.previews = new Set();
    for (const name of ["b_preview_with_metadata", "b_preview"]) {
      window.app.api.addEventListener(name, (event) => window.previews.add(String(event.detail?.nodeId)));
    }
  });
  facts.failure = await run(page);
  facts.previewed = await page.evaluate(() =>
    [...window.previews].map((id) => window.app.graph.getNodeById(id)?.type),
  );
  facts.seconds = (Date.now() - begun) / 1000;
  await showAll(page);
  await outputsLoaded();
  await keepScreenshot(name, (path) => photograph(page, path));
  facts.pictures = await page.evaluate(() =>
    window.app.graph.nodes
      .filter((node) => node.constructor.nodeData?.output_node)
      .map((node) => ({
        type: node.type,
        widths: (node.imgs ?? []).map((image) => image.naturalWidth),
        previews: (node.imgs ?? []).filter((image) => image.src.startsWith("blob:")).length,
      })),
  );
  facts.overlaps = await overlaps();
  return { ...facts, errors: errors.slice(errorsBefore) };
}

/** Wait a little for output nodes to show their output: the front end drops a preview with a delay. */
async function outputsLoaded() {
  const loaded = () => {
    window.app.canvas.draw(true, true);
    const outputs = window.app.graph.nodes.filter((node) => node.constructor.nodeData?.output_node);
    const isOutput = (image) => image.naturalWidth && !image.src.startsWith("blob:");
    return outputs.every((node) => (node.imgs ?? []).every(isOutput));
  };
  await page.waitForFunction(loaded, null, { timeout: 5000 }).catch(() => null); // the test tells
}

/** Pairs of nodes that lie on each other, now that they show their pictures. */
async function overlaps() {
  return page.evaluate(() => {
    const boxes = window.app.graph.nodes.map(({ title, pos: [left, top], size: [width, height] }) => ({
      title,
      left,
      right: left + width,
      top: top - window.LiteGraph.NODE_TITLE_HEIGHT,
      bottom: top + height,
    }));
    const across = (a, b) => a.left < b.right && b.left < a.right;
    const down = (a, b) => a.top < b.bottom && b.top < a.bottom;
    return boxes.flatMap((a, i) =>
      boxes
        .slice(i + 1)
        .filter((b) => across(a, b) && down(a, b))
        .map((b) => [a.title, b.title]),
    );
  });
}

/** Run what is on the page once more: the types of nodes that come from the cache, and Distill's seeds. */
async function runAgain() {
  const seed = () =>
    page.evaluate(() => {
      const distil = window.app.graph.nodes.find((node) => node.type === "DODE_DistillLambdas");
      return distil.widgets.find((widget) => widget.name === "seed").value;
    });
  const seeds = [await seed()];
  await page.evaluate(() => {
    const keep = (event) => (window.cached = event.detail.nodes);
    window.app.api.addEventListener("execution_cached", keep, { once: true });
  });
  await run(page);
  seeds.push(await seed());
  const cached = await page.evaluate(() => window.cached.map((id) => window.app.graph.getNodeById(id).type));
  return { seeds, cached };
}

/** Why a graph is refused that was saved when the node had other inputs. */
async function loadOlder(workflows) {
  const older = structuredClone(workflows["1_first_steps"].workflow);
  const distil = older.nodes.find((node) => node.type === "DODE_DistillLambdas");
  distil.widgets_values = [2, 16, 0, "euler", "beta", "5", 10, "dpmpp_2m", "auto", 0, "first_steps", 4];
  await load(page, older);
  const before = errors.length;
  const refusal = await run(page);
  errors.length = before; // the page reports the refusal, too
  return JSON.stringify(refusal);
}

/** A newly added node's help, opened as people do: click on the node, then on the button above it. */
async function openHelp(type) {
  const title = await page.evaluate((nodeType) => {
    const { app, LiteGraph } = window;
    app.graph.clear();
    app.canvas.ds.reset();
    const node = LiteGraph.createNode(nodeType);
    node.pos = [500, 300];
    app.graph.add(node);
    const view = app.canvas.canvas.getBoundingClientRect();
    return { x: view.left + 560, y: view.top + 285 };
  }, type);
  await page.waitForTimeout(300);
  await page.mouse.click(title.x, title.y);
  await page.getByTestId("info-button").click();
  const content = page.locator(".node-help-content");
  await content.locator("h1").waitFor();
  await content.locator("img").first().waitFor();
  await page.waitForTimeout(500);
  await keepScreenshot("help");
  return {
    text: await content.innerText(),
    widths: await content.locator("img").evaluateAll((images) => images.map((image) => image.naturalWidth)),
    widgets: await page.evaluate(() => window.app.graph.nodes[0].widgets.map((widget) => widget.name)),
  };
}

/** The names of a node's parts, in the language of the settings. */
async function namesOfNodes() {
  return page.evaluate(() => {
    const { title, inputs, outputs } = window.LiteGraph.createNode("DODE_KSampler");
    return { title, names: [...inputs, ...outputs].map((slot) => slot.localized_name) };
  });
}

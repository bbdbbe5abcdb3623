// ComfyUI's page in Chromium: open it, put a graph on it, run it, take its picture.

import { createRequire } from "node:module";

// An ES module's import does not look into $NODE_PATH; require does.
const { chromium } = createRequire(import.meta.url)("playwright-core");

const NOISE = [
  /Error (fetching|loading core) workflow templates/, // their package is not installed
  /graph accessed before initialization/, // by `ready`, which waits for it
  /Failed to load resource: the server responded with a status of 404/, // user.css, userdata on a first visit
  /reading 'id'/, // the front end's own, without any pack
];

/** Open the page; `errors` collects what the console and the page report. */
export async function open(url, viewport = { width: 1920, height: 1200 }) {
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: ["--no-sandbox", "--force-color-profile=srgb"],
  });
  const page = await browser.newPage({ viewport, locale: "en-US" });
  const errors = [];
  const note = (text) => NOISE.some((noise) => noise.test(text)) || errors.push(text);
  page.on("pageerror", (error) => note(String(error)));
  page.on("console", (message) => message.type() === "error" && note(message.text()));
  await page.route("**/object_info", addUpscaleModelLoader);
  await page.goto(url);
  await ready(page);
  await page.waitForTimeout(500);
  await page.keyboard.press("Escape"); // the templates dialog of a first visit
  await page.addStyleTag({
    content: ".p-dialog-mask, .p-toast { display: none !important }",
  });
  return { browser, page, errors };
}

/** Wait until the front end has a graph and knows our nodes. */
export async function ready(page) {
  await page.waitForFunction(() => window.LiteGraph?.registered_node_types.DODE_Compare && window.app?.graph);
}

/** Without spandrel ComfyUI has no such node, and then this front end cannot make a checkpoint loader. */
async function addUpscaleModelLoader(route) {
  const response = await route.fetch();
  const nodes = await response.json();
  nodes.UpscaleModelLoader ??= { ...nodes.VAELoader, name: "UpscaleModelLoader" };
  await route.fulfill({ response, json: nodes });
}

/** Load a workflow as the Open menu does. */
export async function load(page, workflow) {
  await page.evaluate((graph) => window.app.loadGraphData(graph), workflow);
  await page.waitForTimeout(300);
}

/** Set widgets of all nodes of a type. */
export async function setWidgets(page, changes) {
  await page.evaluate((changed) => {
    for (const node of window.app.graph.nodes) {
      for (const widget of node.widgets ?? []) {
        widget.value = changed[node.type]?.[widget.name] ?? widget.value;
      }
    }
  }, changes);
}

/** Queue the graph on the page and wait; null, or the execution error. */
export async function run(page, seconds = 120) {
  return page.evaluate(
    (milliseconds) =>
      new Promise((resolve, reject) => {
        const api = window.app.api;
        const done = (event) => {
          clearTimeout(timer);
          resolve(event.type === "execution_success" ? null : event.detail);
        };
        const timer = setTimeout(() => reject(new Error("the graph did not finish")), milliseconds);
        for (const name of ["execution_success", "execution_error", "execution_interrupted"]) {
          api.addEventListener(name, done, { once: true });
        }
        window.app.queuePrompt(0).then(() => {
          const refused = window.app.lastNodeErrors ?? {};
          if (Object.keys(refused).length) resolve({ refused });
        });
      }),
    seconds * 1000,
  );
}

/** Wait until the pictures of every node in view are loaded. */
async function picturesShown(page) {
  await page.waitForFunction(() => {
    const { nodeOutputs, graph } = window.app;
    const shown = ([id, { images = [] }]) => (graph.getNodeById(id)?.imgs ?? []).length === images.length;
    return Object.entries(nodeOutputs).every(shown);
  });
}

/** Bring the whole graph into view, with its pictures: nodes that are not in view keep those that they had. The part of
 * the page that it takes. */
export async function showAll(page) {
  const box = await page.evaluate((margin) => {
    const { canvas, graph } = window.app;
    const boxes = [...graph.nodes, ...graph.groups].map((item) => {
      const [x, y, width, height] = item.boundingRect ?? item.getBounding();
      return { left: x, top: y, right: x + width, bottom: y + height };
    });
    const left = Math.min(...boxes.map((b) => b.left)) - margin;
    const top = Math.min(...boxes.map((b) => b.top)) - margin;
    const right = Math.max(...boxes.map((b) => b.right)) + margin;
    const bottom = Math.max(...boxes.map((b) => b.bottom)) + margin;
    const view = canvas.canvas.getBoundingClientRect();
    const scale = Math.min(view.width / (right - left), view.height / (bottom - top), 1);
    canvas.deselectAll();
    canvas.show_info = false;
    canvas.ds.scale = scale;
    canvas.ds.offset[0] = -left;
    canvas.ds.offset[1] = -top;
    canvas.setDirty(true, true);
    canvas.draw(true, true);
    return { x: view.left, y: view.top, width: (right - left) * scale, height: (bottom - top) * scale };
  }, 20);
  await picturesShown(page);
  return box;
}

/** Photograph the whole graph, without menus. */
export async function photograph(page, path) {
  const clip = await showAll(page);
  const style = await page.addStyleTag({
    content: `.side-bar-panel, .side-tool-bar-container, .splitter-overlay, .comfyui-body-top,
      .comfyui-body-left, .comfyui-body-right, .comfyui-body-bottom, .graph-canvas-panel > :not(canvas),
      .minimap-main-container, .actionbar, .actionbar *, .p-toast, .selection-toolbox {
        visibility: hidden !important;
      }
      .dom-widget, .dom-widget * { visibility: visible !important }`,
  });
  await page.waitForTimeout(500);
  await page.screenshot({ path, clip });
  await style.evaluate((element) => element.remove());
}

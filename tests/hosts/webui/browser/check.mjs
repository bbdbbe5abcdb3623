// What the test of the page wants to know, printed as JSON.
// node check.mjs < { url, screenshots: folder, infotext }

import { readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const { chromium } = createRequire(join(process.env.NODE_PATH.split(":")[0], "x"))("playwright-core");
const { url, screenshots, infotext } = JSON.parse(readFileSync(0, "utf8"));
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1500, height: 1300 } });
page.setDefaultTimeout(60000);
const errors = [];
page.on("pageerror", (error) => errors.push(String(error)));
page.on("dialog", (dialog) => {
  errors.push(dialog.message());
  dialog.dismiss();
});
await page.goto(url);
const report = { sizes: [] };

/** The value of a component's field. */
const value = (id, tag = "input") => page.locator(`#${id} ${tag}`).first().inputValue();

/** Wait until an element's text has this part. */
const until = (id, part) =>
  page.waitForFunction(([id, part]) => document.querySelector(`#${id}`)?.innerText.includes(part), [id, part]);

/** Wait until a component's field begins with this. */
const untilField = (id, tag, begin) =>
  page.waitForFunction(
    ([id, tag, begin]) => document.querySelector(`#${id} ${tag}`)?.value.startsWith(begin), [id, tag, begin]);

const openTab = (name) =>
  page.getByRole("tab", { name }).or(page.getByRole("button", { name, exact: true })).first().click();

/** The file behind the picture that is shown. */
const shownFile = async () => {
  const source = await page.locator("#txt2img_gallery img").first().getAttribute("src");
  return page.evaluate(async (url) => [...new Uint8Array(await (await fetch(url)).arrayBuffer())], source);
};

async function choose(id, name) {
  const field = page.locator(`#${id} input`).first();
  await field.click();
  await field.fill(name);
  await field.press("Enter");
  await untilField(id, "input", name);
}

async function photograph(name, clip) {
  const path = join(screenshots, name);
  await page.screenshot({ path, clip });
  report.sizes.push(statSync(path).size);
}

await page.locator("#txt2img_prompt textarea").fill(infotext);
await page.locator("#paste").first().click();
await page.waitForFunction(() => document.querySelector("#txt2img_prompt textarea").value.endsWith("asleep"));
await page.locator("#script_txt2img_dode_accordion").getByText("D-ODE", { exact: true }).first().click();
await untilField("script_txt2img_dode_table", "input", "mine");
report.pasted = {
  prompt: await value("txt2img_prompt", "textarea"),
  sampler: await value("txt2img_sampling"),
  steps: await value("txt2img_steps"),
  table: await value("script_txt2img_dode_table"),
};
await page.locator("#txt2img_generate").click();
await until("txt2img_results", "D-ODE table");
report.generated = await page.locator("#txt2img_results").innerText();
await page.locator("#script_txt2img_dode_table input").click(); // all names are shown
await page.waitForTimeout(500);
await photograph("webui_accordion.png");
report.markup = await page.locator('img[src="x"]').count();
await page.keyboard.press("Escape");

const first = await shownFile();
await choose("txt2img_sampling", "Euler");
await choose("script_txt2img_dode_table", "none");
await openTab("PNG Info");
const upload = { name: "first.png", mimeType: "image/png", buffer: Buffer.from(first) };
await page.locator("#pnginfo_image input[type=file]").setInputFiles(upload);
await until("tab_pnginfo", "D-ODE table");
await page.locator("#tab_pnginfo #txt2img_tab").click();
await untilField("txt2img_sampling", "input", "D-ODE");
await untilField("script_txt2img_dode_table", "input", "mine");
const shown = await page.locator("#txt2img_gallery img").first().getAttribute("src");
await page.locator("#txt2img_generate").click();
await page.waitForFunction(
  (old) => ![null, old].includes(document.querySelector("#txt2img_gallery img")?.getAttribute("src") ?? null), shown);
await until("txt2img_results", "Time taken");
report.files = [first, await shownFile()].map((bytes) => Buffer.from(bytes).toString("base64"));

await page.locator("#txt2img_send_to_img2img").click();
await untilField("img2img_prompt", "textarea", "a cat");
await page.locator("#script_img2img_dode_accordion").getByText("D-ODE", { exact: true }).first().click();
await untilField("script_img2img_dode_table", "input", "mine");
report.sent = {
  steps: await value("img2img_steps"),
  table: await value("script_img2img_dode_table"),
};
await choose("img2img_sampling", "D-ODE"); // no host sends the sampling method
await page.locator("#img2img_generate").click();
await until("img2img_results", "Time taken");
report.repainted = await page.locator("#img2img_results").innerText();

await openTab("Distil λ");
await page.locator("#dode_take").click();
await page.waitForFunction(() => document.querySelector("#dode_prompts textarea").value !== "");
report.taken = {
  prompts: await value("dode_prompts", "textarea"),
  negative: await value("dode_negative_prompt", "textarea"),
  cfg: await value("dode_cfg_scale"),
  width: await value("dode_width"),
  height: await value("dode_height"),
  steps: await value("dode_steps", "input,#dode_steps textarea"),
};
await page.locator("#dode_quality").getByText("quick", { exact: true }).click();
await page.locator("#dode_start").click();
const said = page.locator("#dode_said textarea");
await page.waitForFunction(() => document.querySelector("#dode_said textarea").value.includes("left"));
report.began = await said.inputValue();
await photograph("webui_tab.png");
await page.locator("#dode_stop").click();
await page.waitForFunction(() => document.querySelector("#dode_said textarea").value.includes("interrupted"));
report.ended = (await said.inputValue()).trim();
report.errors = errors;
await browser.close();
console.log(JSON.stringify(report));

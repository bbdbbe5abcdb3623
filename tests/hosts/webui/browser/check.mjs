// What the test of the page wants to know, printed as JSON.
// node check.mjs < { url, screenshots: folder, infotext }

import { readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const { chromium } = createRequire(join(process.env.NODE_PATH.split(":")[0], "x"))("playwright-core");
const { url, screenshots, infotext } = JSON.parse(readFileSync(0, "utf8"));
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1500, height: 1300 } });
page.setDefaultTimeout(120000);
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

/** Wait until a function of the page's text is true. */
const until = (id, part) =>
  page.waitForFunction(([id, part]) => document.querySelector(`#${id}`)?.innerText.includes(part), [id, part]);

async function photograph(name, clip) {
  const path = join(screenshots, name);
  await page.screenshot({ path, clip });
  report.sizes.push(statSync(path).size);
}

await page.locator("#txt2img_prompt textarea").fill(infotext);
await page.locator("#paste").first().click();
await page.waitForFunction(() => document.querySelector("#txt2img_prompt textarea").value === "a cat");
await page.locator("#script_txt2img_dode_accordion").getByText("D-ODE", { exact: true }).first().click();
await page.waitForFunction(() => document.querySelector("#script_txt2img_dode_table input").value.startsWith("mine"));
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

await page.locator("#txt2img_send_to_img2img").click();
await page.waitForFunction(() => document.querySelector("#img2img_prompt textarea").value === "a cat");
await page.locator("#script_img2img_dode_accordion").getByText("D-ODE", { exact: true }).first().click();
await page.waitForFunction(() => document.querySelector("#script_img2img_dode_table input").value.startsWith("mine"));
report.sent = {
  steps: await value("img2img_steps"),
  table: await value("script_img2img_dode_table"),
};

await page.getByRole("tab", { name: "Distil λ" }).or(page.getByRole("button", { name: "Distil λ" })).first().click();
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

// The example workflows, as they are built on the page: nodes (type, place, size, widgets), links, groups.

const CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors";

const demo = (at, kind = "eps", digit = 3) => ({ type: "DODE_DemoModel", at, widgets: { kind, digit } });
const emptyLatent = (at, size, batch_size) => ({
  type: "EmptyLatentImage",
  at,
  size: [270, 106],
  widgets: { width: size, height: size, batch_size },
});
const load = (at, name) => ({ type: "DODE_LoadLambdas", at, widgets: { name } });
const note = (size, text) => ({
  type: "MarkdownNote",
  title: "What to do",
  at: [0, 0],
  size,
  widgets: { text },
});
const prompt = (at, title, text) => ({
  type: "CLIPTextEncode",
  title,
  at,
  size: [340, 140],
  widgets: { text },
});
const decode = (at, width = 270) => ({ type: "VAEDecode", at, size: [width, 46] });
// The digits are 64×64 pixels, and a preview does not enlarge.
const enlarge = (at, width = 270) => ({
  type: "ImageScaleBy",
  at,
  size: [width, 82],
  widgets: { upscale_method: "bicubic", scale_by: 4 },
});
const preview = (at, size) => ({ type: "PreviewImage", at, size });
const fixed = (seed) => ({ seed, control_after_generate: "fixed" });
const dodeKSampler = (at, widgets) => ({ type: "DODE_KSampler", at, size: [270, 262], widgets });
const kSampler = (at, widgets) => ({ type: "KSampler", at, size: [270, 262], widgets });

const firstSteps = {
  nodes: {
    note: note(
      [300, 250],
      `## First steps

Nothing to download: a small model of handwritten digits comes with the pack.

1. Press **Run**.
2. **Distill λ** runs a slow, exact sampler and a fast one on the same noises. It finds the numbers λ that bring the fast one closest and saves them as a *λ table*. With a **refine_budget**, it then fits all numbers of the fast sampler together.
3. **Compare** starts from new noises and samples with the plain fast sampler, with the table, and with the slow one.
4. **KSampler (D-ODE)** samples with the table. It costs no more than the fast sampler.

When you press Run again, Distill λ keeps its result until you change one of its inputs.`,
    ),
    demo: demo([0, 370]),
    latent: emptyLatent([0, 590], 64, 1),
    distil: {
      type: "DODE_DistillLambdas",
      at: [390, 0],
      size: [640, 1084],
      widgets: { cfg: 2, steps: "5", save_name: "first_steps" },
    },
    compare: {
      type: "DODE_Compare",
      at: [1120, 0],
      size: [720, 580],
      widgets: { ...fixed(1), cfg: 2, steps: 5, pictures: 8 },
    },
    empty: emptyLatent([1120, 690], 64, 8),
    sampler: dodeKSampler([1120, 860], { ...fixed(7), steps: 5, cfg: 2 }),
    decode: decode([1430, 690], 410),
    enlarge: enlarge([1430, 800], 410),
    preview: preview([1430, 950], [410, 250]),
  },
  links: `
    demo.model distil.model       demo.positive distil.positive     demo.negative distil.negative
    latent.LATENT distil.latent   distil.table compare.table        distil.table sampler.table
    demo.model compare.model      demo.positive compare.positive    demo.negative compare.negative
    demo.vae compare.vae          latent.LATENT compare.latent
    demo.model sampler.model      demo.positive sampler.positive    demo.negative sampler.negative
    empty.LATENT sampler.latent_image   sampler.latent decode.samples   demo.vae decode.vae
    decode.IMAGE enlarge.image    enlarge.IMAGE preview.images`,
  groups: {
    "Model": ["demo", "latent"],
    "1. Distil λ, once": ["distil"],
    "2. Compare": ["compare"],
    "3. Sample": ["empty", "sampler", "decode", "enlarge", "preview"],
  },
};

const forYourCheckpoint = {
  nodes: {
    note: note(
      [330, 300],
      `## Distil λ for your checkpoint

1. Choose your checkpoint (SD 1.5 or SDXL) and set the size you sample at: 512 for SD 1.5, 1024 for SDXL.
2. Set **cfg** to what you sample with, in both nodes.
3. Write prompts like those you use. All get an equal share of the noises, so that λ is not fitted to a single picture.
4. Name the table under **save_name** and press **Run**.

This takes about as long as 16 pictures of 225 steps, and you do it once for this checkpoint. With a **refine_budget** of 4 it takes three to four times that, and it gains the most. Then set the **scheduler** to beta and use one number of **steps** at a time if you can.

You then find the table in **Load λ table** (press R to refresh). The example *3_sample_with_a_table* shows how to use it.`,
    ),
    checkpoint: {
      type: "CheckpointLoaderSimple",
      at: [0, 390],
      size: [330, 98],
      widgets: { ckpt_name: CHECKPOINT },
    },
    latent: emptyLatent([0, 570], 512, 1),
    prompt: prompt([420, 0], "Prompt", "photograph of a red fox in fresh snow, morning light"),
    another: prompt([420, 230], "Another prompt", "portrait of an old fisherman, oil painting"),
    negative: prompt([420, 460], "Negative prompt", "blurry, low quality"),
    distil: {
      type: "DODE_DistillLambdas",
      at: [850, 0],
      size: [640, 874],
      widgets: { save_name: "my_checkpoint" },
    },
    sampler: dodeKSampler([1580, 0], { ...fixed(7), steps: 8 }),
    decode: decode([1580, 340]),
    save: { type: "SaveImage", at: [1580, 466], size: [270, 408], widgets: { filename_prefix: "D-ODE" } },
  },
  links: `
    checkpoint.CLIP prompt.clip          checkpoint.CLIP another.clip      checkpoint.CLIP negative.clip
    checkpoint.MODEL distil.model        prompt.CONDITIONING distil.positive
    another.CONDITIONING options.positive_2   options.options distil.options
    negative.CONDITIONING distil.negative
    latent.LATENT distil.latent
    checkpoint.MODEL sampler.model       prompt.CONDITIONING sampler.positive
    negative.CONDITIONING sampler.negative   latent.LATENT sampler.latent_image
    distil.table sampler.table           sampler.latent decode.samples
    checkpoint.VAE decode.vae            decode.IMAGE save.images`,
  groups: {
    "Model and size": ["checkpoint", "latent"],
    "Prompts": ["prompt", "another", "negative"],
    "1. Distil λ, once": ["distil"],
    "2. Sample": ["sampler", "decode", "save"],
  },
};

const withATable = {
  nodes: {
    note: note(
      [300, 280],
      `## Sample with a table

There are three ways to use a λ table, and all give the same pictures: each row of the result shows one way. Press **Run**, then use the way that fits your graph.

- **KSampler (D-ODE)** in place of a KSampler;
- **Apply λ to model** before a KSampler that has the table's sampler, scheduler and steps;
- **D-ODE sampler** and **D-ODE sigmas** for SamplerCustomAdvanced.

For your own model, replace the demo model with its loader and choose its table in Load λ table. The example *2_distil_for_your_checkpoint* makes one.`,
    ),
    demo: demo([0, 390], "eps", 8),
    table: load([0, 610], "demo_eps.safetensors"),
    empty: emptyLatent([0, 750], 64, 5),

    ksampler: dodeKSampler([390, 0], { ...fixed(7), steps: 6, cfg: 2 }),
    apply: { type: "DODE_ApplyLambdas", at: [390, 390], size: [270, 78] },
    stock: kSampler([390, 550], { ...fixed(7), steps: 6, cfg: 2, sampler_name: "euler", scheduler: "karras" }),

    sampler: { type: "DODE_Sampler", at: [750, 0] },
    sigmas: { type: "DODE_Sigmas", at: [750, 140], widgets: { steps: 6 } },
    noise: { type: "RandomNoise", at: [750, 330], widgets: { noise_seed: 7, control_after_generate: "fixed" } },
    guider: { type: "CFGGuider", at: [750, 500], widgets: { cfg: 2 } },
    custom: { type: "SamplerCustomAdvanced", at: [750, 690], size: [270, 122] },

    two: { type: "LatentBatch", at: [1110, 0], size: [220, 46] },
    three: { type: "LatentBatch", at: [1370, 0], size: [220, 46] },
    decode: decode([1110, 130], 220),
    enlarge: enlarge([1370, 130], 220),
    preview: preview([1110, 300], [480, 340]),
  },
  links: `
    table.table ksampler.table      table.table apply.table        table.table sampler.table
    table.table sigmas.table
    demo.model ksampler.model       demo.positive ksampler.positive   demo.negative ksampler.negative
    demo.model apply.model          apply.model stock.model
    demo.positive stock.positive    demo.negative stock.negative
    demo.model guider.model         demo.positive guider.positive  demo.negative guider.negative
    empty.LATENT ksampler.latent_image   empty.LATENT stock.latent_image   empty.LATENT custom.latent_image
    noise.NOISE custom.noise        guider.GUIDER custom.guider    sampler.sampler custom.sampler
    sigmas.sigmas custom.sigmas
    ksampler.latent two.samples1    stock.LATENT two.samples2
    two.LATENT three.samples1       custom.output three.samples2
    three.LATENT decode.samples     demo.vae decode.vae
    decode.IMAGE enlarge.image      enlarge.IMAGE preview.images`,
  groups: {
    "Model, table, size": ["demo", "table", "empty"],
    "KSampler (D-ODE)": ["ksampler"],
    "Apply λ, KSampler": ["apply", "stock"],
    "SamplerCustom": ["sampler", "sigmas", "noise", "guider", "custom"],
    "Three times the same": ["two", "three", "decode", "enlarge", "preview"],
  },
};

const imageToImage = {
  nodes: {
    note: note(
      [300, 240],
      `## img2img

Press **Run**. The first KSampler draws sevens. The second one adds noise to those pictures and draws nines over them. **denoise** sets how much may change.

With a table, denoise runs the last *round(steps × denoise)* of the table's steps: 0.6 of 10 steps is 6. Choose a row with many steps, so that enough of them are run.

For your own model, use Load Image and VAE Encode in place of the first KSampler, and a table made for that model.`,
    ),
    demo: demo([0, 360], "eps", 7),
    nine: demo([0, 580], "eps", 9),
    table: load([0, 800], "demo_eps.safetensors"),
    empty: emptyLatent([390, 0], 64, 4),
    first: dodeKSampler([390, 190], { ...fixed(3), steps: 10, cfg: 2 }),
    decode: decode([390, 530]),
    enlarge: enlarge([390, 656]),
    picture: preview([700, 0], [340, 376]),
    encode: { type: "VAEEncode", at: [700, 480], size: [340, 46] },
    second: dodeKSampler([1130, 0], { ...fixed(5), steps: 10, cfg: 2, denoise: 0.6 }),
    decode2: decode([1130, 340]),
    enlarge2: enlarge([1130, 466]),
    result: preview([1440, 0], [340, 376]),
  },
  links: `
    demo.model first.model         demo.positive first.positive     demo.negative first.negative
    table.table first.table        empty.LATENT first.latent_image
    first.latent decode.samples    demo.vae decode.vae              decode.IMAGE enlarge.image
    enlarge.IMAGE picture.images
    decode.IMAGE encode.pixels     demo.vae encode.vae              encode.LATENT second.latent_image
    demo.model second.model        nine.positive second.positive    demo.negative second.negative
    table.table second.table       second.latent decode2.samples    demo.vae decode2.vae
    decode2.IMAGE enlarge2.image   enlarge2.IMAGE result.images`,
  groups: {
    "Model and table": ["demo", "nine", "table"],
    "A picture": ["empty", "first", "decode", "enlarge", "picture", "encode"],
    "Draw over it": ["second", "decode2", "enlarge2", "result"],
  },
};

const flowModel = {
  nodes: {
    note: note(
      [300, 250],
      `## A flow model

SD3, Flux and other flow models work like the others. Use a scheduler made for them: **simple** or **beta** in place of karras. Press **Run**.

On the left are the plain sampler and the same one with λ, from the same noise at the same cost. On the right, both are compared with the slow sampler, and you see what is in the table.

For your own model, use its loader, its ModelSampling node, its cfg and its kind of empty latent, and a table distilled with all of them. A table belongs to one **shift**.`,
    ),
    demo: demo([0, 360], "flow", 5),
    table: load([0, 580], "demo_flow.safetensors"),
    empty: emptyLatent([0, 720], 64, 4),
    stock: kSampler([390, 0], { ...fixed(7), steps: 4, cfg: 2, sampler_name: "euler", scheduler: "simple" }),
    decode1: decode([390, 340]),
    enlarge1: enlarge([390, 466]),
    preview1: preview([690, 0], [460, 548]),
    dode: dodeKSampler([390, 660], { ...fixed(7), steps: 4, cfg: 2 }),
    decode2: decode([390, 1000]),
    enlarge2: enlarge([390, 1126]),
    preview2: preview([690, 660], [460, 548]),
    compare: {
      type: "DODE_Compare",
      at: [1240, 0],
      size: [720, 580],
      widgets: { ...fixed(1), cfg: 2, steps: 4, pictures: 8 },
    },
    inspect: { type: "DODE_InspectLambdas", at: [1240, 690], size: [720, 518] },
  },
  links: `
    demo.model stock.model         demo.positive stock.positive     demo.negative stock.negative
    empty.LATENT stock.latent_image
    stock.LATENT decode1.samples   demo.vae decode1.vae             decode1.IMAGE enlarge1.image
    enlarge1.IMAGE preview1.images
    demo.model dode.model          demo.positive dode.positive      demo.negative dode.negative
    table.table dode.table         empty.LATENT dode.latent_image
    dode.latent decode2.samples    demo.vae decode2.vae             decode2.IMAGE enlarge2.image
    enlarge2.IMAGE preview2.images
    demo.model compare.model       demo.positive compare.positive   demo.negative compare.negative
    demo.vae compare.vae           empty.LATENT compare.latent      table.table compare.table
    table.table inspect.table`,
  groups: {
    "Model, table, size": ["demo", "table", "empty"],
    "Stock": ["stock", "decode1", "enlarge1", "preview1"],
    "D-ODE": ["dode", "decode2", "enlarge2", "preview2"],
    "Both against the slow sampler": ["compare"],
    "The table": ["inspect"],
  },
};

export const examples = {
  "1_first_steps": firstSteps,
  "2_distil_for_your_checkpoint": forYourCheckpoint,
  "3_sample_with_a_table": withATable,
  "4_img2img": imageToImage,
  "5_flow_model": flowModel,
};

/** Build one on the page, through the front end's own classes, and return it as it would be saved. */
export async function build(page, example) {
  return page.evaluate(({ nodes, links, groups }) => {
    const { graph } = window.app;
    const { LiteGraph, LGraphGroup } = window;
    window.app.clean(); // the pictures of an earlier graph
    graph.clear();
    const made = {};
    for (const [name, { type, title, at, size, widgets }] of Object.entries(nodes)) {
      const node = LiteGraph.createNode(type);
      if (node === null) throw new Error(`no node type ${type}`);
      graph.add(node);
      node.pos = at;
      if (title) node.title = title;
      if (size) node.setSize(size);
      for (const [widget, value] of Object.entries(widgets ?? {})) {
        const found = node.widgets.find((candidate) => candidate.name === widget);
        if (!found) throw new Error(`${type} has no widget ${widget}`);
        found.value = value;
      }
      made[name] = node;
    }
    const words = links.trim().split(/\s+/);
    for (let i = 0; i < words.length; i += 2) {
      const [[from, output], [to, input]] = [words[i].split("."), words[i + 1].split(".")];
      const slot = made[from].outputs.findIndex((candidate) => candidate.name === output);
      if (slot < 0 || !made[from].connect(slot, made[to], input)) {
        throw new Error(`cannot connect ${words[i]} to ${words[i + 1]}`);
      }
    }
    for (const [title, members] of Object.entries(groups)) {
      const boxes = members.map((name) => ({ pos: made[name].pos, size: made[name].size }));
      const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map(({ pos }) => pos[axis])));
      const [right, bottom] = [0, 1].map((axis) =>
        Math.max(...boxes.map(({ pos, size }) => pos[axis] + size[axis])),
      );
      const group = new LGraphGroup(title);
      group.pos = [left - 15, top - 75];
      group.size = [right - left + 30, bottom - top + 90];
      graph.add(group);
    }
    return graph.serialize();
  }, example);
}

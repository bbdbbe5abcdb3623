// The example workflows, as they are built on the page: nodes (type, place, size, widgets), links, groups.

const CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors";
const CHECKPOINT_URL = `https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/${CHECKPOINT}?download=true`;

const CFG = 3; // of the model of landscapes

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
const prompt = (at, title, text, height = 140) => ({
  type: "CLIPTextEncode",
  title,
  at,
  size: [340, height],
  widgets: { text },
});
// The model of landscapes and its prompts, below a note.
const landscapes = (text) => ({
  demo: { type: "DODE_DemoPictures", at: [0, 370], size: [340, 66] },
  prompt: prompt([0, 500], "Prompt", text, 100),
  negative: prompt([0, 660], "Negative prompt", "", 100),
});
const decode = (at, width = 270) => ({ type: "VAEDecode", at, size: [width, 46] });
// Pictures of the demo models are small, and a preview does not enlarge.
const enlarge = (at, width = 270, scale_by = 4) => ({
  type: "ImageScaleBy",
  at,
  size: [width, 82],
  widgets: { upscale_method: "bicubic", scale_by },
});
const preview = (at, size) => ({ type: "PreviewImage", at, size });
const fixed = (seed) => ({ seed, control_after_generate: "fixed" });
// With room for a live preview below the widgets, as core's templates have.
const dodeKSampler = (at, widgets) => ({ type: "DODE_KSampler", at, size: [270, 540], widgets });
const kSampler = (at, widgets) => ({ type: "KSampler", at, size: [270, 474], widgets });

const firstSteps = {
  nodes: {
    note: note(
      [340, 250],
      `## First steps

Nothing to download: a small model that draws what you write comes with the pack. It knows landscapes: *sunset over a lake*, *night sea, moon*, *snow on the mountains*.

1. Press **Run**. It takes a minute or two.
2. **Distill λ** runs a slow, exact sampler once and fits a fast one to it. It saves the fast one as a *λ table*.
3. **Compare** starts from new noises and samples with a stock sampler, with the table, and with the slow one.
4. **KSampler (D-ODE)** samples with the table. It costs no more than the stock sampler.

When you press Run again, Distill λ keeps its result until you change one of its inputs.`,
    ),
    ...landscapes("sunset over a lake, clouds"),
    latent: emptyLatent([0, 820], 128, 1),
    distil: {
      type: "DODE_DistillLambdas",
      at: [430, 0],
      size: [480, 780],
      widgets: { cfg: CFG, steps: "4", save_name: "first_steps" },
    },
    compare: {
      type: "DODE_Compare",
      at: [1000, 0],
      size: [860, 780],
      widgets: { ...fixed(1), cfg: CFG, steps: 4, pictures: 8 },
    },
    empty: emptyLatent([430, 900], 128, 8),
    sampler: dodeKSampler([740, 900], { ...fixed(7), steps: 4, cfg: CFG }),
    decode: decode([1050, 900], 270),
    enlarge: enlarge([1050, 1020], 270, 2),
    preview: preview([1360, 900], [500, 310]),
  },
  links: `
    demo.clip prompt.clip         demo.clip negative.clip
    demo.model distil.model       prompt.CONDITIONING distil.positive   negative.CONDITIONING distil.negative
    latent.LATENT distil.latent   distil.table compare.table            distil.table sampler.table
    demo.model compare.model      prompt.CONDITIONING compare.positive  negative.CONDITIONING compare.negative
    demo.vae compare.vae          latent.LATENT compare.latent
    demo.model sampler.model      prompt.CONDITIONING sampler.positive  negative.CONDITIONING sampler.negative
    empty.LATENT sampler.latent_image   sampler.latent decode.samples   demo.vae decode.vae
    decode.IMAGE enlarge.image    enlarge.IMAGE preview.images`,
  groups: {
    "Model": ["demo", "prompt", "negative", "latent"],
    "1. Distil λ, once": ["distil"],
    "2. Compare": ["compare"],
    "3. Sample": ["empty", "sampler", "decode", "enlarge", "preview"],
  },
};

const forYourCheckpoint = {
  nodes: {
    note: note(
      [330, 250],
      `## Distil λ for your checkpoint

1. Choose your checkpoint (SD 1.5 or SDXL) and set the size you sample at: 512 for SD 1.5, 1024 for SDXL.
2. Set **cfg** and **steps** to what you sample with, in all three nodes.
3. Write prompts like those you use. The second one keeps the table from fitting a single picture.
4. Name the table under **save_name** and press **Run**.

Before it starts, **Distill λ** says what it will cost. You do this once for a checkpoint. **Compare** then shows your prompt by the best stock setting, by the table, and by the slow sampler.

To sample only, select the groups *1* and *2* and press Ctrl+B. KSampler (D-ODE) then finds the table by itself.`,
    ),
    checkpoint: {
      type: "CheckpointLoaderSimple",
      at: [0, 340],
      size: [330, 98],
      widgets: { ckpt_name: CHECKPOINT },
      models: [{ name: CHECKPOINT, url: CHECKPOINT_URL, directory: "checkpoints" }],
    },
    latent: emptyLatent([0, 520], 512, 1),
    prompt: prompt([420, 0], "Prompt", "photograph of a red fox in fresh snow, morning light"),
    another: prompt([420, 210], "Another prompt", "portrait of an old fisherman, oil painting"),
    negative: prompt([420, 420], "Negative prompt", "blurry, low quality"),
    options: { type: "DODE_DistillOptions", at: [420, 650], size: [220, 30], collapsed: true },
    distil: {
      type: "DODE_DistillLambdas",
      at: [850, 0],
      size: [500, 560],
      widgets: { save_name: "my_checkpoint" },
    },
    compare: { type: "DODE_Compare", at: [1440, 0], size: [520, 1220], widgets: { ...fixed(1), steps: 6 } },
    sampler: dodeKSampler([850, 680], { ...fixed(7), steps: 6 }),
    decode: decode([1150, 680], 200),
    save: { type: "SaveImage", at: [1150, 800], size: [200, 420], widgets: { filename_prefix: "D-ODE" } },
  },
  links: `
    checkpoint.CLIP prompt.clip          checkpoint.CLIP another.clip      checkpoint.CLIP negative.clip
    checkpoint.MODEL distil.model        prompt.CONDITIONING distil.positive
    another.CONDITIONING options.positive_2   options.options distil.options
    negative.CONDITIONING distil.negative     latent.LATENT distil.latent
    checkpoint.MODEL compare.model       prompt.CONDITIONING compare.positive
    negative.CONDITIONING compare.negative   latent.LATENT compare.latent
    checkpoint.VAE compare.vae           distil.table compare.table
    checkpoint.MODEL sampler.model       prompt.CONDITIONING sampler.positive
    negative.CONDITIONING sampler.negative   latent.LATENT sampler.latent_image
    distil.table sampler.table           sampler.latent decode.samples
    checkpoint.VAE decode.vae            decode.IMAGE save.images`,
  groups: {
    "Model and size": ["checkpoint", "latent"],
    "Prompts": ["prompt", "another", "negative", "options"],
    "1. Distil λ, once": ["distil"],
    "2. Compare": ["compare"],
    "3. Sample": ["sampler", "decode", "save"],
  },
};

const withATable = {
  nodes: {
    note: note(
      [300, 280],
      `## Sample with a table

There are three ways to use a λ table: each row of the result shows one way. Press **Run**, then use the way that fits your graph.

- **KSampler (D-ODE)** in place of a KSampler;
- **Apply λ to model** before a KSampler that has the table's sampler, scheduler and steps. That KSampler keeps its own σ, so only λ acts here: the pictures end a little further from those of many steps;
- **D-ODE sampler** and **D-ODE sigmas** for SamplerCustomAdvanced: the same pictures as the first row.

For your own model, replace the demo model with its loader and choose its table in Load λ table. The example *2_distil_for_your_checkpoint* makes one.`,
    ),
    demo: demo([0, 390], "eps", 8),
    table: load([0, 610], "demo_eps.safetensors"),
    empty: emptyLatent([0, 900], 64, 5),

    ksampler: dodeKSampler([390, 0], { ...fixed(7), steps: 6, cfg: 2 }),
    apply: { type: "DODE_ApplyLambdas", at: [390, 650], size: [270, 78] },
    stock: kSampler([390, 840], { ...fixed(7), steps: 6, cfg: 2, sampler_name: "euler", scheduler: "karras" }),

    sampler: { type: "DODE_Sampler", at: [750, 0] },
    sigmas: { type: "DODE_Sigmas", at: [750, 140], widgets: { steps: 6 } },
    noise: { type: "RandomNoise", at: [750, 330], widgets: { noise_seed: 7, control_after_generate: "fixed" } },
    guider: { type: "CFGGuider", at: [750, 500], widgets: { cfg: 2 } },
    custom: { type: "SamplerCustomAdvanced", at: [750, 690], size: [270, 330] },

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
    "One row of pictures each": ["two", "three", "decode", "enlarge", "preview"],
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
    decode: decode([390, 800]),
    enlarge: enlarge([390, 926]),
    picture: preview([700, 0], [340, 376]),
    encode: { type: "VAEEncode", at: [700, 480], size: [340, 46] },
    second: dodeKSampler([1130, 0], { ...fixed(5), steps: 10, cfg: 2, denoise: 0.6 }),
    decode2: decode([1130, 610]),
    enlarge2: enlarge([1130, 736]),
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
    empty: emptyLatent([0, 870], 64, 4),
    stock: kSampler([390, 0], { ...fixed(7), steps: 4, cfg: 2, sampler_name: "euler", scheduler: "simple" }),
    decode1: decode([390, 540]),
    enlarge1: enlarge([390, 660]),
    preview1: preview([690, 0], [460, 742]),
    dode: dodeKSampler([390, 860], { ...fixed(7), steps: 4, cfg: 2 }),
    decode2: decode([390, 1470]),
    enlarge2: enlarge([390, 1590]),
    preview2: preview([690, 860], [460, 812]),
    compare: {
      type: "DODE_Compare",
      at: [1240, 0],
      size: [720, 742],
      widgets: { ...fixed(1), cfg: 2, steps: 4, pictures: 8 },
    },
    inspect: { type: "DODE_InspectLambdas", at: [1240, 860], size: [720, 812] },
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

const previewPickFinish = {
  nodes: {
    note: note(
      [340, 250],
      `## Preview, pick, finish

A few D-ODE steps end where many steps end. So look at many noises cheaply, and pay for one.

1. Press **Run**. KSampler (D-ODE) draws eight noises in 4 steps each.
2. Count to the one you like, from 0, and set **batch_index** to it.
3. Press **Run** again. Only that noise is drawn with 40 steps of the slow sampler. It is the same picture, finished.

Both samplers need the same **seed**. **Latent From Batch** keeps the noise's place in the batch.`,
    ),
    ...landscapes("sunset, mountains, clouds"),
    table: { ...load([0, 820], "demo_pictures.safetensors"), size: [340, 180] },
    empty: emptyLatent([430, 0], 128, 8),
    few: dodeKSampler([430, 190], { ...fixed(11), steps: 4, cfg: CFG }),
    decode1: decode([430, 800]),
    enlarge1: enlarge([430, 920], 270, 2),
    previews: preview([740, 0], [420, 1002]),
    pick: { type: "LatentFromBatch", at: [1250, 0], size: [270, 82], widgets: { batch_index: 2, length: 1 } },
    many: kSampler([1250, 190], {
      ...fixed(11),
      steps: 40,
      cfg: CFG,
      sampler_name: "dpmpp_2m",
      scheduler: "simple",
    }),
    decode2: decode([1250, 800]),
    enlarge2: enlarge([1250, 920], 270, 2),
    finished: preview([1560, 0], [300, 1002]),
  },
  links: `
    demo.clip prompt.clip         demo.clip negative.clip
    demo.model few.model          prompt.CONDITIONING few.positive   negative.CONDITIONING few.negative
    table.table few.table         empty.LATENT few.latent_image
    few.latent decode1.samples    demo.vae decode1.vae           decode1.IMAGE enlarge1.image
    enlarge1.IMAGE previews.images
    empty.LATENT pick.samples     pick.LATENT many.latent_image
    demo.model many.model         prompt.CONDITIONING many.positive  negative.CONDITIONING many.negative
    many.LATENT decode2.samples   demo.vae decode2.vae           decode2.IMAGE enlarge2.image
    enlarge2.IMAGE finished.images`,
  groups: {
    "Model and table": ["demo", "prompt", "negative", "table"],
    "1. Preview": ["empty", "few", "decode1", "enlarge1", "previews"],
    "2. Pick, finish": ["pick", "many", "decode2", "enlarge2", "finished"],
  },
};

export const examples = {
  "1_first_steps": firstSteps,
  "2_distil_for_your_checkpoint": forYourCheckpoint,
  "3_sample_with_a_table": withATable,
  "4_img2img": imageToImage,
  "5_flow_model": flowModel,
  "6_preview_pick_finish": previewPickFinish,
};

/** Build one on the page, through the front end's own classes, and return it as it would be saved. */
export async function build(page, example) {
  return page.evaluate(({ nodes, links, groups }) => {
    const { graph } = window.app;
    const { LiteGraph, LGraphGroup } = window;
    window.app.clean(); // the pictures of an earlier graph
    graph.clear();
    const made = {};
    for (const [name, { type, title, at, size, widgets, models, collapsed }] of Object.entries(nodes)) {
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
      if (models) node.properties.models = models;
      if (collapsed) node.collapse();
      made[name] = node;
    }
    const around = (boxes) => {
      const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map(({ pos }) => pos[axis])));
      const [right, bottom] = [0, 1].map((axis) =>
        Math.max(...boxes.map(({ pos, size }) => pos[axis] + size[axis])),
      );
      return { left, top, right, bottom };
    };
    const words = links.trim().split(/\s+/);
    for (let i = 0; i < words.length; i += 2) {
      const [[from, output], [to, input]] = [words[i].split("."), words[i + 1].split(".")];
      const slot = made[from].outputs.findIndex((candidate) => candidate.name === output);
      if (slot < 0 || !made[from].connect(slot, made[to], input)) {
        throw new Error(`cannot connect ${words[i]} to ${words[i + 1]}`);
      }
    }
    for (const [title, members] of Object.entries(groups)) {
      const { left, top, right, bottom } = around(members.map((name) => made[name]));
      const group = new LGraphGroup(title);
      group.pos = [left - 15, top - 75];
      group.size = [right - left + 30, bottom - top + 90];
      graph.add(group);
    }
    const { left, top, right, bottom } = around([...graph.nodes, ...graph.groups]);
    // Opened, all of it is in view on a page of 1600 × 1000 with menus at the left and on top.
    const scale = Math.min(1440 / (right - left), 860 / (bottom - top), 1);
    const workflow = graph.serialize(); // with the view that the page has at present
    workflow.extra.ds = { scale, offset: [-left + 110 / scale, -top + 90 / scale] };
    return workflow;
  }, example);
}

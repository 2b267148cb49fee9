// Loads exported folders in transformers.js, and prints what they compute as JSON.
//   node transformers.cjs NODE_FOLDER JOBS.json
// NODE_FOLDER has the node_modules. JOBS.json is a list of {folder, dtype, prompt, tokens}, for a language model that
// continues a prompt, or {folder, dtype, pixels, size}, for an image of one channel with values from 0 to 255.
const { readFileSync } = require("node:fs");
const { basename, dirname } = require("node:path");
const [, , modules, jobs] = process.argv;
const web = require("node:module").createRequire(`${modules}/`)("@huggingface/transformers");

async function writes({ dtype, prompt, tokens }, name) {
  const write = await web.pipeline("text-generation", name, { dtype });
  const [{ generated_text: text }] = await write(prompt, { max_new_tokens: tokens, do_sample: false });
  const inputs = write.tokenizer(prompt);
  const all = await write.model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false });
  const { logits } = await write.model(inputs);
  return { text, ids: all.tolist()[0].map(Number), logits: Array.from(logits.data), type: logits.type };
}

async function classifies({ dtype, pixels, size }, name) {
  const classify = await web.pipeline("image-classification", name, { dtype });
  const image = new web.RawImage(Uint8Array.from(pixels), size, size, 1);
  const { pixel_values: values } = await classify.processor(image);
  const { logits } = await classify.model({ pixel_values: values });
  const inputs = Array.from(values.data);
  return { classes: await classify(image), inputs, logits: Array.from(logits.data), type: logits.type };
}

(async () => {
  web.env.allowRemoteModels = false;
  const results = [];
  for (const job of JSON.parse(readFileSync(jobs, "utf8"))) {
    web.env.localModelPath = `${dirname(job.folder)}/`;
    results.push(await (job.pixels ? classifies : writes)(job, basename(job.folder)));
  }
  console.log(JSON.stringify(results));
})();

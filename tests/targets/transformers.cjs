// Loads exported folders in transformers.js, and prints what they compute as JSON.
//   node transformers.cjs NODE_FOLDER JOBS.json
// NODE_FOLDER has the node_modules. JOBS.json is a list of {folder, dtype, prompt, tokens}, for a language model that
// continues a prompt, {folder, dtype, pixels, size}, for an image with values from 0 to 255, or {folder, dtype, pipeline,
// text}, for an encoder; a question and its context are two texts.
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
  const image = new web.RawImage(Uint8Array.from(pixels), size, size, pixels.length / size ** 2);
  const { pixel_values: values } = await classify.processor(image);
  const { logits } = await classify.model({ pixel_values: values });
  const inputs = Array.from(values.data);
  return { classes: await classify(image), inputs, logits: Array.from(logits.data), type: logits.type };
}

async function encodes({ dtype, pipeline, text }, name) {
  const encode = await web.pipeline(pipeline, name, { dtype });
  const [first, second] = [text].flat();
  const inputs = encode.tokenizer(first, { text_pair: second });
  const ids = inputs.input_ids.tolist()[0].map(Number);
  if (second) {
    const { start_logits: start, end_logits: end } = await encode.model(inputs);
    return { ids, start: Array.from(start.data), end: Array.from(end.data), result: await encode(first, second) };
  }
  const result = await encode(first, { top_k: 3 });
  return result.dims ? { ids, features: Array.from(result.data) } : { ids, result };
}

(async () => {
  web.env.allowRemoteModels = false;
  const results = [];
  for (const job of JSON.parse(readFileSync(jobs, "utf8"))) {
    web.env.localModelPath = `${dirname(job.folder)}/`;
    results.push(await (job.pixels ? classifies : job.pipeline ? encodes : writes)(job, basename(job.folder)));
  }
  console.log(JSON.stringify(results));
})();

// Two exported models in the browser: a LLaMA that writes, and a ViT that reads a drawn digit.
// serve.py gives the addresses: /lib/ has transformers.js, /ort/ ONNX Runtime's WebAssembly, /models/ the exports.

const TOKENS = 256; // length of a text
const STEP = 4; // tokens between two looks at the screen and at the button
const SIZE = 8; // pixels of a side of the ViT's images
const STROKE = 0.09; // width of the pen, as a share of the canvas

const $ = (id) => document.getElementById(id);
const page = document.documentElement.dataset; // what tests read: state, device, seconds, rate
const soon = () => new Promise((resolve) => setTimeout(resolve)); // lets the page draw and take events

function fail(message) {
  page.state = "failed";
  $("problem").textContent = message;
  $("problem").hidden = false;
  $("status").textContent = "";
}

// -- what this browser has ------------------------------------------------------------------------------------------

// A module with one function that makes a vector of zeros: (func (drop (i32x4.splat (i32.const 0))))
const SIMD_MODULE = Uint8Array.of(
  0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 9, 1, 7, 0, 65, 0, 253, 17, 26, 11,
);

function missing() {
  if (typeof WebAssembly !== "object") {
    return "This browser has no WebAssembly, or it is switched off.";
  }
  if (!WebAssembly.validate(SIMD_MODULE)) {
    return "This browser has no SIMD instructions in WebAssembly, which ONNX Runtime needs.";
  }
  if (!Object.hasOwn || !Array.prototype.at) {
    return "This browser's JavaScript is older than transformers.js needs (Object.hasOwn, Array.prototype.at).";
  }
  return "";
}

async function hasWebGpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

// -- loading --------------------------------------------------------------------------------------------------------

let library, write, read;
let gpu = false; // whether this browser has WebGPU
let stopped = false;

async function load(device) {
  const begin = performance.now();
  $("status").textContent = "Loading ...";
  $("problem").hidden = true;
  for (const id of ["device", "write"]) $(id).disabled = true;
  library ??= await import("/lib/transformers.min.js");
  const { env, pipeline } = library;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = "/models/";
  env.useBrowserCache = env.useWasmCache = false; // the server is near, and its files may change
  // The build with WebGPU is twice as large, and slower on a processor.
  const build = `/ort/ort-wasm-simd-threaded${gpu ? ".asyncify" : ""}`;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${build}.mjs`, wasm: `${build}.wasm` };
  await Promise.all([write?.dispose(), read?.dispose()]);
  write = read = undefined;
  const options = { device, dtype: "fp32" };
  [write, read] = await Promise.all([
    pipeline("text-generation", "llama", options),
    pipeline("image-classification", "vit", options),
  ]);
  await classify(); // the first run compiles, so that the first digit does not wait
  const seconds = (performance.now() - begin) / 1000;
  const threads = self.crossOriginIsolated ? env.backends.onnx.wasm.numThreads || navigator.hardwareConcurrency : 1;
  const where = device === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} thread${threads === 1 ? "" : "s"}`;
  $("status").textContent = `Ready: loaded in ${seconds.toFixed(1)} s (${where})`;
  for (const id of ["device", "write"]) $(id).disabled = false;
  Object.assign(page, { state: "ready", device, seconds });
}

function loadOrFail(device) {
  page.state = "loading";
  return load(device).catch((error) => {
    fail(`The models cannot be loaded: ${error.message ?? error}. examples/browser/serve.py says how to export them.`);
    $("device").disabled = !gpu; // the other device may work
  });
}

// -- the LLaMA ------------------------------------------------------------------------------------------------------

async function writeText() {
  const { tokenizer, model } = write;
  const prompt = $("prompt").value || "\n";
  const temperature = Number($("temperature").value);
  const sampling = temperature ? { do_sample: true, temperature, top_k: 0 } : { do_sample: false };
  let { input_ids: ids } = tokenizer(prompt);
  const first = ids.dims[1];
  const room = Math.min(TOKENS, model.config.max_position_embeddings - first);
  let cache = null;
  stopped = false;
  $("write").disabled = true;
  $("stop").disabled = false;
  const begin = performance.now();
  for (let done = 0; done < room && !stopped; ) {
    const more = Math.min(STEP, room - done);
    const result = await model.generate({
      input_ids: ids,
      attention_mask: library.ones_like(ids),
      past_key_values: cache,
      max_new_tokens: more,
      return_dict_in_generate: true,
      ...sampling,
    });
    ids = result.sequences;
    cache = result.past_key_values;
    const written = ids.dims[1] - first;
    show(prompt, tokenizer.decode(ids.tolist()[0].slice(first), { skip_special_tokens: true }));
    page.rate = written / ((performance.now() - begin) / 1000);
    $("speed").textContent = `${written} tokens, ${Math.round(page.rate)} tokens/s`;
    if (written < done + more) break; // the model ended its text
    done = written;
    await soon();
  }
  await cache?.dispose();
  page.written = ids.tolist()[0].join(" ");
  $("write").disabled = false;
  $("stop").disabled = true;
}

function show(prompt, text) {
  const beginning = document.createElement("b");
  beginning.textContent = prompt;
  $("text").replaceChildren(beginning, text);
  $("text").scrollTop = $("text").scrollHeight;
}

// -- the ViT --------------------------------------------------------------------------------------------------------

const ink = $("ink").getContext("2d", { willReadFrequently: true });
const seen = $("seen").getContext("2d", { willReadFrequently: true });

// The box around what is drawn, or null. The model was trained on digits that fill their image.
function drawnBox() {
  const { width, height } = ink.canvas;
  const { data } = ink.getImageData(0, 0, width, height);
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (data[4 * (y * width + x)] > 127) {
        [left, right] = [Math.min(left, x), Math.max(right, x)];
        [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
      }
    }
  }
  return right < 0 ? null : { left, top, width: right - left + 1, height: bottom - top + 1 };
}

// The drawing in SIZE x SIZE pixels, each the mean of the ink in its part of the box.
function shrink() {
  seen.fillStyle = "#000";
  seen.fillRect(0, 0, SIZE, SIZE);
  const box = drawnBox();
  if (!box) return null;
  const side = Math.max(box.width, box.height);
  const width = (SIZE * box.width) / side;
  const height = (SIZE * box.height) / side;
  seen.imageSmoothingQuality = "high";
  seen.drawImage(
    ink.canvas, box.left, box.top, box.width, box.height, (SIZE - width) / 2, (SIZE - height) / 2, width, height,
  );
  const image = seen.getImageData(0, 0, SIZE, SIZE);
  const grey = Array.from({ length: SIZE * SIZE }, (_, i) => image.data[4 * i]);
  const brightest = Math.max(...grey, 1); // a thin stroke has become grey, but the digits of the training are white
  const pixels = Uint8ClampedArray.from(grey, (value) => (255 * value) / brightest);
  pixels.forEach((value, i) => image.data.set([value, value, value], 4 * i));
  seen.putImageData(image, 0, 0);
  return pixels;
}

async function classify() {
  const pixels = shrink();
  const image = new library.RawImage(pixels ?? new Uint8ClampedArray(SIZE * SIZE), SIZE, SIZE, 1);
  const classes = await read(image, { top_k: null });
  showScores(pixels ? classes : []);
}

function showScores(classes) {
  const shares = new Map(classes.map(({ label, score }) => [label.replace("LABEL_", ""), score]));
  const best = classes[0]?.label.replace("LABEL_", "");
  $("scores").replaceChildren(
    ...Array.from({ length: 10 }, (_, digit) => {
      const share = 100 * (shares.get(String(digit)) ?? 0);
      const item = document.createElement("li");
      const bar = document.createElement("i");
      const figure = document.createElement("span");
      bar.style.setProperty("--share", `${share}%`);
      figure.textContent = classes.length ? `${share.toFixed(1)}%` : "";
      item.className = String(digit) === best ? "best" : "";
      item.append(String(digit), bar, figure);
      return item;
    }),
  );
  page.digit = best ?? "";
  $("digit").textContent = best ? `It reads ${best}.` : "\u00a0";
}

let last = null; // where the pen was

function pen(event) {
  const { left, top, width, height } = ink.canvas.getBoundingClientRect();
  const point = [((event.clientX - left) / width) * ink.canvas.width, ((event.clientY - top) / height) * ink.canvas.height];
  Object.assign(ink, { lineWidth: STROKE * ink.canvas.width, lineCap: "round", strokeStyle: "#fff" });
  ink.beginPath();
  ink.moveTo(...(last ?? point));
  ink.lineTo(...point);
  ink.stroke();
  last = point;
}

function clear() {
  ink.fillStyle = "#000";
  ink.fillRect(0, 0, ink.canvas.width, ink.canvas.height);
  shrink();
  showScores([]);
}

// -- the page -------------------------------------------------------------------------------------------------------

$("ink").addEventListener("pointerdown", (event) => {
  ink.canvas.setPointerCapture(event.pointerId);
  last = null;
  pen(event);
});
$("ink").addEventListener("pointermove", (event) => last && pen(event));
$("ink").addEventListener("pointerup", () => {
  last = null;
  if (page.state === "ready") classify();
});
$("clear").addEventListener("click", clear);
$("write").addEventListener("click", () => writeText().catch((error) => fail(`The text ended early: ${error.message}`)));
$("stop").addEventListener("click", () => (stopped = true));
$("device").addEventListener("change", () => loadOrFail($("device").value));

clear();
const problem = missing();
if (problem) {
  fail(`${problem} Use Chrome or Edge 93, Firefox 114, Safari 16.4, or a later version.`);
} else {
  gpu = await hasWebGpu();
  const option = $("device").querySelector("[value=webgpu]");
  if (gpu) Object.assign(option, { disabled: false, textContent: "WebGPU" });
  loadOrFail("wasm");
}

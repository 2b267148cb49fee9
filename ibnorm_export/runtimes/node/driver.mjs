// Runs one ONNX file for the Python process that started it, and ends with it.
//
// node driver.mjs REPLIES: requests come on standard input, replies go to the file descriptor REPLIES. A message is the
// length of its header (4 bytes, little endian), the header (JSON), and the data of the tensors that the header lists.
// Standard output is not used for replies, because the runtime may print there.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const OLDEST_NODE = 18;
const ARRAYS = {
  float32: Float32Array,
  float64: Float64Array,
  float16: Uint16Array,
  int8: Int8Array,
  int32: Int32Array,
  int64: BigInt64Array,
  uint8: Uint8Array,
  bool: Uint8Array,
};

const replies = Number(process.argv[2]);

/** Reads `count` bytes, or ends the process: the one that sent requests has gone. */
function read(count) {
  const bytes = new Uint8Array(count);
  for (let done = 0; done < count; ) {
    const got = fs.readSync(0, bytes, done, count - done, null);
    if (got === 0) process.exit(0);
    done += got;
  }
  return bytes;
}

function write(bytes) {
  for (let done = 0; done < bytes.byteLength; ) {
    done += fs.writeSync(replies, bytes, done, bytes.byteLength - done);
  }
}

function receive() {
  const length = new DataView(read(4).buffer).getUint32(0, true);
  return JSON.parse(Buffer.from(read(length)).toString("utf8"));
}

function reply(header, data = []) {
  const text = Buffer.from(JSON.stringify(header), "utf8");
  const length = new Uint8Array(4);
  new DataView(length.buffer).setUint32(0, text.byteLength, true);
  for (const bytes of [length, text, ...data]) write(bytes);
}

/** Opens a session: onnxruntime-node reads a file itself, onnxruntime-web is given the bytes. */
async function open(request) {
  const major = Number(process.versions.node.split(".")[0]);
  if (major < OLDEST_NODE) {
    throw new Error(`this is Node ${process.versions.node}; it needs Node ${OLDEST_NODE} or later`);
  }
  const ort = createRequire(path.join(request.folder, "node_modules", "driver.js"))(request.package);
  ort.env.logLevel = "fatal";
  const options = { logSeverityLevel: 4, graphOptimizationLevel: "all" };
  if (request.package === "onnxruntime-web") {
    if (request.threads !== null) ort.env.wasm.numThreads = request.threads;
    options.executionProviders = ["wasm"];
    options.externalData = request.external.map(([name, file]) => ({ path: name, data: fs.readFileSync(file) }));
    return [ort, await ort.InferenceSession.create(fs.readFileSync(request.model), options)];
  }
  options.executionProviders = ["cpu"];
  if (request.threads !== null) options.intraOpNumThreads = request.threads;
  return [ort, await ort.InferenceSession.create(request.model, options)];
}

function tensorsOf(ort, request) {
  const tensors = {};
  for (const { name, type, shape, bytes } of request.tensors) {
    tensors[name] = new ort.Tensor(type, new ARRAYS[type](read(bytes).buffer), shape);
  }
  return tensors;
}

let ort, session, inputs;
for (;;) {
  const request = receive();
  try {
    if (request.call === "open") {
      [ort, session] = await open(request);
      reply({ outputs: session.outputNames, versions: { ...ort.env.versions, node: process.versions.node } });
    } else if (request.call === "run") {
      inputs = tensorsOf(ort, request);
      const outputs = Object.entries(await session.run(inputs));
      const data = outputs.map(([, t]) => new Uint8Array(t.data.buffer, t.data.byteOffset, t.data.byteLength));
      const tensors = outputs.map(([name, t], i) => ({ name, type: t.type, shape: t.dims, bytes: data[i].byteLength }));
      reply({ tensors }, data);
    } else {
      // "time": one more pass with the inputs of the last "run"
      const start = performance.now();
      await session.run(inputs);
      reply({ ms: performance.now() - start });
    }
  } catch (error) {
    reply({ error: String(error?.message ?? error) });
  }
}

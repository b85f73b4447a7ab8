/* The page of `dejavu serve`: one prompt, answered by the dense and by the sparse model.

In: GET v1/models, and two streams of POST v1/completions or v1/chat/completions, the sparse one with its trace. Out: both texts with their
speeds and densities while they come, where they first differ, and maps of which neurons and heads each token needed. Everything is
asked of the page's own server, by addresses relative to the page, and everything that comes back is text, never markup. */
"use strict";

const BINS = 64; // into which a trace divides the neurons of a layer
const FRAME = 80; // ms between two drawings of a run: the browser may share its cores with the server
const LEFT = 24, RIGHT = 44; // px next to a map: the layer's number, its figures
const $ = (id) => document.getElementById(id);
const count = (value) => value.toLocaleString("en");
const number = (value) => (value >= 100 ? count(Math.round(value)) : value.toPrecision(3));
const percent = (share) => (share ? `${(100 * share).toPrecision(share < 0.0995 ? 2 : 3)}%` : "0%");
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/* ---- the server ---- */

/** Something the reader should know, in words. status: HTTP's, if it was an answer. */
class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const key = $("key").value.trim();
  // Of other characters fetch() throws, or sends Latin-1 where the server reads UTF-8. Like a 401, this asks for another key.
  if (/[^ -~]/.test(key)) throw new Refusal("This API key cannot be sent: it may have only ASCII letters, digits and signs.", 401);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw new Refusal(await refusal(response, key), response.status);
  return response;
}

/** What the page asks of a model: the address, and the body without how the answer is to come. */
function request(model, { chat, prompt, maxTokens, temperature, seed }) {
  const input = chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  return { path: chat ? "v1/chat/completions" : "v1/completions", body: { model: model.id, ...input, max_tokens: maxTokens, temperature, seed } };
}

async function refusal(response, key) {
  const said = await response.json().then((body) => body?.error?.message, () => null);
  const message = said ? String(said) : response.statusText || "no reason given";
  if (response.status === 401 && key) return "The server does not take this API key.";
  if (response.status === 401) return "The server wants an API key: give it above and press Run.";
  if (response.status === 429) {
    const seconds = Number(response.headers.get("Retry-After"));
    return `The server is busy and its queue is full. Try again ${seconds > 0 ? `in ${plural(seconds, "second")}` : "soon"}.`;
  }
  if (response.status >= 500) return `The server failed (${response.status}): ${message}`;
  return `The server refused (${response.status}): ${message}`;
}

/** The data of each server-sent event of a response. */
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw signal.aborted ? error : new Refusal("The connection to the server was lost.");
      });
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** One token's trace, with the density of each layer. A token without one came from the prompt's pass, which is dense. */
function unpack(trace, { layers, heads }) {
  if (!trace?.neurons) {
    const full = new Array(layers).fill(1);
    return { mlp: null, head: null, neurons: null, heads: null, mlpByLayer: full, headsByLayer: full };
  }
  const neurons = bytes(trace.neurons), on = bytes(trace.heads);
  const share = (values, width, most) =>
    Array.from({ length: layers }, (_, layer) => mean(values.subarray(layer * width, (layer + 1) * width)) / most);
  return {
    mlp: trace.mlp_density ?? null, head: trace.head_density ?? null, neurons, heads: on,
    mlpByLayer: share(neurons, BINS, 255), headsByLayer: share(on, heads, 1),
  };
}

/* ---- one side: dense or sparse ---- */

const answers = [];
let running = null; // the AbortController of a run
let same = 0; // characters that both texts begin with
let fork = null; // where they part: { piece } of the sparse text, null if it ends there

class Answer {
  constructor(side) {
    this.side = side;
    this.card = $(side);
    this.model = null; // its entry of v1/models
    this.part("text").addEventListener("scroll", ({ target: { scrollHeight, scrollTop, clientHeight } }) => {
      this.atEnd = scrollHeight - scrollTop - clientHeight < 30; // a reader who scrolls back stays there
    });
    this.clear({ maxTokens: 1 });
  }

  part(name) {
    return $(`${this.side}-${name}`);
  }

  clear({ prompt = "", chat = false, maxTokens, record = false }) {
    this.traced = record && this.side === "sparse";
    if (this.traced) this.part("text").removeAttribute("tabindex"); // its tokens take the focus
    else this.part("text").tabIndex = 0;
    Object.assign(this, { text: "", pieces: [], tokens: [], shape: null, made: 0, first: 0, firstAt: 0, lastAt: 0, limit: maxTokens });
    Object.assign(this, { speed: null, mlp: null, heads: null, reason: null, whole: false, failed: null, atEnd: true }); // failed: why
    const span = document.createElement("span");
    span.className = "prompt";
    span.textContent = chat ? "" : prompt;
    this.part("text").replaceChildren(span);
    this.fresh = document.createDocumentFragment(); // pieces that are not drawn yet
    Object.assign(this.part("error"), { hidden: true, textContent: "" });
    this.say("");
    this.figures();
  }

  say(words) {
    this.part("state").textContent = words;
  }

  /** Stream one answer to its end. Errors end up on the card; returns HTTP's status of a refusal, else 0. */
  async run(settings, signal) {
    const { path, body } = request(this.model, settings);
    Object.assign(body, { stream: true, stream_options: { include_usage: true } }, this.traced && { dejavu: { trace: true } });
    this.card.classList.add("running");
    this.say("reading the prompt");
    try {
      const response = await ask(path, body, signal);
      for await (const data of events(response, signal)) {
        if (data === "[DONE]") {
          this.whole = true;
          break;
        }
        this.take(JSON.parse(data));
      }
      if (!this.whole) throw new Refusal("The connection to the server was lost.");
      this.say(this.reason === "length" ? "reached max tokens" : "ended by itself");
    } catch (error) {
      if (signal.aborted) this.say("stopped");
      else {
        const message = error instanceof Refusal ? error.message : `The page does not understand the server's answer: ${error.message}`;
        this.failed = message.replace(/[^.!?]$/, "$&.");
        this.part("error").textContent = this.made ? `${this.failed} What came until then is above.` : this.failed;
        this.part("error").hidden = false;
        this.say("failed");
        return error.status ?? 0;
      }
    } finally {
      this.card.classList.remove("running");
      compare();
      draw();
    }
    return 0;
  }

  take(chunk) {
    if (chunk.error) throw new Refusal(`The server failed: ${chunk.error.message}`);
    const extra = chunk.dejavu ?? {}, choice = chunk.choices?.[0], traces = extra.trace ?? [];
    const text = choice?.text ?? choice?.delta?.content ?? "";
    this.shape ??= extra.shape ?? null;
    const made = this.shape ? traces.length : Number(text !== ""); // without a trace a piece counts as a token until the usage comes
    if (made) {
      this.lastAt = performance.now();
      if (!this.made) Object.assign(this, { first: made, firstAt: this.lastAt });
      if (!this.made) this.say("writing");
      this.made += made;
    }
    const from = this.pieces.at(-1)?.to ?? 0;
    for (const trace of this.shape ? traces : []) this.tokens.push(unpack(trace, this.shape));
    if (text) this.add(text, from, this.shape ? this.tokens.length : this.made);
    this.reason = choice?.finish_reason ?? this.reason;
    this.speed = extra.tok_s ?? this.speed;
    this.mlp = extra.mlp_density ?? this.mlp;
    this.heads = extra.head_density ?? this.heads;
    this.made = chunk.usage?.completion_tokens ?? this.made;
    drawSoon();
  }

  /** A piece of text, made by the tokens from `from` up to `to`. */
  add(text, from, to) {
    const node = document.createElement("span");
    node.className = "piece";
    node.textContent = text;
    if (this.traced) node.tabIndex = -1;
    this.pieces.push({ node, from, to, start: this.text.length });
    this.fresh.append(node);
    this.text += text;
    compare();
  }

  /** Mark the piece that holds the character at `position`. */
  mark(position) {
    const piece = position < this.text.length ? this.pieces.findLast(({ start }) => start <= position) : null;
    piece?.node.classList.add("fork");
    return piece;
  }

  figures() {
    this.part("text").append(this.fresh);
    const elapsed = (this.lastAt - this.firstAt) / 1000;
    const recorded = this.tokens.filter(({ mlp }) => mlp !== null);
    // Of the first token alone nothing is known: no step decoded it, it comes from the prompt's pass.
    const known = (whole, each) => whole ?? (recorded.length ? mean(recorded.map(each)) : this.side === "dense" && this.made > 1 ? 1 : null);
    this.rate = this.speed ?? (this.made > this.first && elapsed > 0 ? (this.made - this.first) / elapsed : null);
    const mlp = known(this.mlp, (token) => token.mlp), heads = known(this.heads, (token) => token.head);
    const fastest = Math.max(...answers.map((answer) => answer.rate ?? 0), this.rate ?? 0);
    this.figure("speed", this.rate === null ? null : number(this.rate), this.rate / fastest);
    this.figure("tokens", this.made ? count(this.made) : null, this.made / this.limit);
    this.figure("mlp", mlp === null ? null : percent(mlp), mlp);
    this.figure("heads", heads === null ? null : percent(heads), heads);
    Object.assign(this, { mlpShown: mlp, headsShown: heads });
    if (this.atEnd && running) this.part("text").scrollTop = this.part("text").scrollHeight;
  }

  figure(name, text, share) {
    this.part(name).textContent = text ?? "\u2013";
    this.part(`${name}-bar`).style.setProperty("--share", text === null ? 0 : Math.min(share, 1));
  }
}

/* ---- both sides ---- */

const [dense, sparse] = [new Answer("dense"), new Answer("sparse")];
answers.push(dense, sparse);

function compare() {
  const [a, b] = [dense.text, sparse.text], end = Math.min(a.length, b.length);
  if (fork) return;
  while (same < end && a[same] === b[same]) same++;
  if (same < end || (dense.whole && sparse.whole && a.length !== b.length)) {
    dense.mark(same);
    fork = { piece: sparse.mark(same) };
  }
}

function strong(text, name = "") {
  const node = document.createElement("strong");
  node.textContent = text;
  node.className = name;
  return node;
}

/** The outcome of a finished run, as nodes of the status line. */
function outcome({ together, record }) {
  if (!sparse.model) return ["Dense alone: the server runs this model without an adapter."];
  const nodes = [], { mlpShown: mlp, headsShown: heads } = sparse;
  if (dense.rate && sparse.rate) {
    const gain = sparse.rate / dense.rate;
    nodes.push("Sparse ran at ", strong(`${gain.toPrecision(3)}\u00d7`, gain > 1 ? "gain" : ""), " the speed of dense");
    const slowed = [...(together ? ["sharing the machine"] : []), ...(record ? ["recording its maps"] : [])];
    if (slowed.length) nodes.push(` while ${slowed.join(" and ")}`);
  } else if (Math.min(dense.made, sparse.made) < 2) {
    nodes.push("A single token comes from the prompt and tells nothing of the speed");
    if (mlp !== null) nodes.push(". Sparse answered");
  } else nodes.push("Sparse answered");
  if (mlp !== null && heads !== null) {
    nodes.push(", reading ", strong(percent(mlp)), " of the MLP neurons and ", ...(heads < 1 ? [strong(percent(heads)), " of the heads"] : ["all heads"]));
  }
  if (!fork) nodes.push(". Both answers are the same.");
  else nodes.push(fork.piece ? `. The answers part at token ${fork.piece.from + 1}.` : ". The sparse answer ends first.");
  return nodes;
}

function status(...nodes) {
  $("status").replaceChildren(...nodes);
}

function wrong(message) {
  const node = document.createElement("span");
  node.className = "wrong";
  node.textContent = message;
  status(node);
}

/** Learn what the server runs; throws a Refusal. */
async function connect() {
  const { data } = await (await ask("v1/models")).json();
  const described = data.filter((model) => model.dejavu);
  sparse.model = described.find(({ dejavu }) => dejavu.mode === "sparse") ?? null;
  dense.model = described.find(({ id, dejavu }) => dejavu.mode === "dense" && sparse.model && id === `${sparse.model.id}:dense`)
    ?? described.find(({ dejavu }) => dejavu.mode === "dense") ?? null;
  if (!dense.model) throw new Refusal("The server lists no dense model, so this page has nothing to compare.");
  const { id, dejavu: { layers, neurons, heads, backend, dtype, chat } } = sparse.model ?? dense.model;
  const size = layers && `${plural(layers, "layer")} of ${count(neurons)} neurons and ${plural(heads, "head")}`;
  document.title = `dejavu: ${id}`;
  $("facts").textContent = [id, size, backend && `${backend}, ${dtype}`].filter(Boolean).join(" \u00b7 ");
  $("kind").hidden = !chat;
  sparse.card.hidden = $("order").hidden = $("record").hidden = !sparse.model;
  $("answers").classList.toggle("alone", !sparse.model);
  showCall();
}

function settings() {
  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
  const figure = (id) => ($(id).value ? $(id).valueAsNumber : undefined); // JSON leaves an empty one out
  return {
    prompt: $("prompt").value, maxTokens: figure("max-tokens"), temperature: figure("temperature"), seed: figure("seed"),
    chat: !$("kind").hidden && chosen("kind") === "chat", together: chosen("order") === "together", record: chosen("record") === "on",
  };
}

/** Swap Run and Stop in place; the focus goes along. */
function swap(from, to) {
  const focused = document.activeElement === from;
  $("prompt-hint").hidden = from === $("run");
  $("stop-hint").hidden = from === $("stop");
  from.hidden = true;
  to.hidden = false;
  if (focused) to.focus();
}

async function run() {
  if (running) return;
  const { signal } = (running = new AbortController());
  swap($("run"), $("stop"));
  try {
    if (!dense.model) await connect();
    await runAnswers(settings(), signal);
  } catch (error) {
    refused(error);
  } finally {
    running = null;
    swap($("stop"), $("run"));
    draw(); // the maps over time need no more room for tokens to come
  }
}

async function runAnswers(chosen, signal) {
  const taking = answers.filter(({ model }) => model);
  same = 0;
  fork = null;
  Object.assign(maps, { shown: -1, follow: true });
  for (const answer of taking) answer.clear(chosen);
  draw();
  const states = [];
  if (chosen.together) {
    status("Both answers are being written.");
    states.push(...(await Promise.all(taking.map((answer) => answer.run(chosen, signal)))));
  } else {
    for (const answer of taking.slice(1)) answer.say("waits for its turn");
    for (const answer of taking) {
      if (signal.aborted || states.includes(401)) answer.say("not run");
      else {
        status(`The ${answer.side} answer is being written.`);
        states.push(await answer.run(chosen, signal));
      }
    }
  }
  if (states.includes(401)) askForKey();
  const failed = taking.filter((answer) => answer.failed), reasons = new Set(failed.map((answer) => answer.failed));
  if (signal.aborted) status("Stopped.");
  else if (reasons.size === 1 && !taking.some(({ whole }) => whole)) {
    wrong(failed[0].failed); // once, not on each card
    for (const answer of failed) answer.part("error").hidden = true;
  } else if (failed.length) wrong("This run did not finish; the reason stands below.");
  else status(...outcome(chosen));
}

function askForKey() {
  $("key-field").hidden = false;
  $("key").focus();
  showCall();
}

/** Show the request of the form as a command for a POSIX shell; it names the key's variable, never the key. */
function showCall() {
  const model = sparse.model ?? dense.model, secured = !$("key-field").hidden;
  $("address").textContent = new URL("v1", document.baseURI);
  $("any-key").hidden = secured;
  $("own-key").hidden = !secured;
  $("call").hidden = !model;
  $("no-call").hidden = Boolean(model);
  if (!model) return;
  const { path, body } = request(model, settings());
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [
    `curl ${quoted(new URL(path, document.baseURI).href)}`, ...(secured ? ['-H "Authorization: Bearer $DEJAVU_KEY"'] : []),
    "-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(body))}`,
  ];
  $("call").textContent = lines.join(" \\\n  ");
}

function refused(error) {
  wrong(error instanceof Refusal ? error.message : `The page does not understand the server: ${error.message}`);
  if (error.status === 401) askForKey();
  if (!dense.model) $("facts").textContent = "";
}

/* ---- the maps ---- */

const maps = { shown: -1, follow: true, waiting: false, ramps: null };
const scratch = document.createElement("canvas");

/** 256 colours between the stops --NAME-0 to --NAME-3 of the style sheet, [256 x RGB]. */
function ramp(name, style) {
  const digits = [0, 1, 2, 3].map((stop) => style.getPropertyValue(`--${name}-${stop}`).trim());
  const stops = digits.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, value) => {
    const at = (3 * value) / 255, stop = Math.min(Math.floor(at), 2);
    return stops[stop].map((low, part) => low + (at - stop) * (stops[stop + 1][part] - low));
  });
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  // A square root for neurons: a few per cent of a bin must be seen.
  const neurons = { colours: ramp("neurons", style), scale: Math.sqrt }, heads = { colours: ramp("heads", style), scale: (share) => share };
  maps.ramps = { neurons, heads, muted: colour("--muted"), ink: colour("--ink"), font: `11px ${colour("--font")}` };
}

/** Draw rows x columns shares (0 to 1) as cells: the layers' numbers at the left, notes at the right, a frame around the column `mark`.
 * room: columns that there will be. */
function paint(canvas, { rows, columns, room = columns, share, kind, notes = null, mark = -1 }) {
  const { ink, muted, font, [kind]: { colours, scale } } = maps.ramps;
  const width = canvas.clientWidth, high = Math.max(5, Math.min(17, Math.floor(220 / rows))), ratio = devicePixelRatio || 1;
  const above = Math.max(0, 6 - high / 2), height = rows * high + 2 * above; // room for the first and the last number
  if (!width) return;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d"), inner = width - LEFT - RIGHT, wide = inner / room;
  context.scale(ratio, ratio);
  context.translate(0, above);
  if (columns) {
    const image = new ImageData(columns, rows);
    for (let row = 0, at = 0; row < rows; row++)
      for (let column = 0; column < columns; column++, at += 4) {
        const [red, green, blue] = colours[Math.round(255 * scale(Math.min(share(row, column), 1)))];
        image.data.set([red, green, blue, 255], at);
      }
    Object.assign(scratch, { width: columns, height: rows });
    scratch.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(scratch, LEFT, 0, columns * wide, rows * high);
  }
  for (let row = 1; row <= rows; row++) context.clearRect(LEFT, row * high - 1, inner, 1);
  if (wide >= 5) for (let column = 1; column <= columns; column++) context.clearRect(LEFT + column * wide - 1, 0, 1, rows * high);
  if (mark >= 0) {
    Object.assign(context, { strokeStyle: ink, lineWidth: 2 });
    context.strokeRect(LEFT + mark * wide - 1, 1, Math.max(wide, 3) + 1, rows * high - 2);
  }
  Object.assign(context, { font, fillStyle: muted, textAlign: "right", textBaseline: "middle" });
  for (let row = 0, step = Math.ceil(11 / high); row < rows; row += step) {
    context.fillText(row, LEFT - 7, (row + 0.5) * high);
    if (notes) context.fillText(notes[row], width, (row + 0.5) * high);
  }
}

function drawSoon() {
  if (maps.waiting) return;
  maps.waiting = true;
  const drawNow = () => {
    maps.waiting = false;
    draw();
  };
  setTimeout(() => requestAnimationFrame(drawNow), running ? FRAME : 0);
}

function draw() {
  for (const answer of answers) answer.figures();
  const { tokens, shape } = sparse;
  $("maps").hidden = !shape || !tokens.length;
  if ($("maps").hidden) return;
  if (maps.follow) maps.shown = tokens.length - 1;
  label();
  const token = tokens[maps.shown], { layers, heads } = shape;
  const recorded = tokens.filter(({ mlp }) => mlp !== null);
  const skips = recorded.some(({ head }) => head < 1);
  $("grid").classList.toggle("all-heads", !skips);
  $("heads-note").hidden = skips;
  $("mean-note").hidden = !recorded.length;
  const room = running ? Math.max(sparse.limit, tokens.length) : tokens.length;
  const on = (layer) => (token.heads ? token.heads.subarray(layer * heads, (layer + 1) * heads).reduce((sum, one) => sum + one, 0) : heads);
  const rows = Array.from({ length: layers }, (_, layer) => layer);
  const bars = { rows: layers, columns: BINS, kind: "neurons", notes: token.mlpByLayer.map(percent) };
  paint($("neurons-token"), { ...bars, share: (layer, bin) => (token.neurons ? token.neurons[layer * BINS + bin] / 255 : 1) });
  const dots = { rows: layers, columns: heads, kind: "heads", notes: rows.map((layer) => `${on(layer)}/${heads}`) };
  paint($("heads-token"), { ...dots, share: (layer, head) => (token.heads ? token.heads[layer * heads + head] : 1) });
  const line = { rows: layers, columns: tokens.length, room, mark: maps.shown };
  const means = (key) => (recorded.length ? rows.map((layer) => percent(mean(recorded.map((one) => one[key][layer])))) : null);
  const mlp = (layer, column) => tokens[column].mlpByLayer[layer], head = (layer, column) => tokens[column].headsByLayer[layer];
  paint($("neurons-time"), { ...line, kind: "neurons", notes: means("mlpByLayer"), share: mlp });
  paint($("heads-time"), { ...line, kind: "heads", notes: means("headsByLayer"), share: head });
  const spoken = (values) => values.map((value, layer) => `layer ${layer} ${value}`).join(", ");
  $("neurons-token").ariaLabel = `Neurons read for token ${maps.shown + 1}: ${spoken(bars.notes)}`;
  $("heads-token").ariaLabel = `Heads that fired for token ${maps.shown + 1}: ${spoken(dots.notes)}`;
  $("neurons-time").ariaLabel = `MLP density of ${layers} layers over ${plural(tokens.length, "token")}; the slider moves through them`;
  $("heads-time").ariaLabel = `Head density of ${layers} layers over ${plural(tokens.length, "token")}`;
  $("bins-note").textContent = `rows are layers, a cell is ${plural(Math.round(shape.neurons / BINS), "neuron")}`;
}

/** What stands above the maps about the token that they show, and its mark in the text. */
function label() {
  const { tokens, pieces } = sparse, token = tokens[maps.shown], piece = pieces.find(({ to }) => to > maps.shown);
  $("token-number").textContent = `${maps.shown + 1} of ${tokens.length}`;
  $("token-text").textContent = piece ? piece.node.textContent.replaceAll("\n", "\u21b5") : "";
  $("token-text").hidden = !piece;
  const densities = () => `MLP ${percent(token.mlp)}, heads ${percent(token.head)}`;
  $("token-note").textContent = token.mlp === null ? "out of the prompt's pass, which is dense" : densities();
  Object.assign($("token"), { disabled: false, max: tokens.length, value: maps.shown + 1 });
  for (const { node } of pieces) {
    const here = node === piece?.node;
    if (node.classList.toggle("shown", here) !== (node.tabIndex === 0)) node.tabIndex = here ? 0 : -1;
  }
}

/** Show a token, counted from 0. follow: go on to each new one while they come; reveal: scroll the text to it. */
function show(token, { follow = false, reveal = false } = {}) {
  Object.assign(maps, { shown: Math.max(0, Math.min(token, sparse.tokens.length - 1)), follow });
  const node = reveal && sparse.pieces.find(({ to }) => to > maps.shown)?.node, box = sparse.part("text");
  if (node?.isConnected && (node.offsetTop < box.scrollTop || node.offsetTop > box.scrollTop + box.clientHeight - 30)) {
    sparse.atEnd = false;
    box.scrollTop = node.offsetTop - box.clientHeight / 2;
  }
  drawSoon();
}

/* ---- the reader ---- */

function pieceOf(node) {
  return sparse.pieces.find((piece) => piece.node === node);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) $("form").requestSubmit();
});
$("kind").addEventListener("change", () => {
  $("prompt-label").textContent = settings().chat ? "Message" : "Prompt";
});
for (const kind of ["mouseover", "focusin"])
  $("sparse-text").addEventListener(kind, ({ target }) => {
    const piece = pieceOf(target);
    if (piece && sparse.shape) show(piece.to - 1);
  });
$("sparse-text").addEventListener("mouseleave", (event) => {
  if (running && !event.currentTarget.contains(document.activeElement)) show(maps.shown, { follow: true });
});
$("sparse-text").addEventListener("keydown", (event) => {
  const at = sparse.pieces.indexOf(pieceOf(event.target)), last = sparse.pieces.length - 1;
  const to = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: last }[event.key];
  if (at < 0 || to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  sparse.pieces[Math.max(0, Math.min(to, last))].node.focus();
});
$("token").addEventListener("input", (event) => show(event.target.valueAsNumber - 1, { reveal: true }));
for (const id of ["neurons-time", "heads-time"])
  for (const kind of ["pointermove", "pointerdown"])
    $(id).addEventListener(kind, ({ offsetX, currentTarget }) => {
      const room = running ? Math.max(sparse.limit, sparse.tokens.length) : sparse.tokens.length;
      show(Math.floor(((offsetX - LEFT) / (currentTarget.clientWidth - LEFT - RIGHT)) * room), { reveal: true });
    });
$("form").addEventListener("input", showCall);
document.querySelector("details").addEventListener("toggle", showCall); // a browser may have restored the form without an event
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  theme();
  draw();
});
new ResizeObserver(drawSoon).observe($("maps"));

theme();
connect().catch(refused).finally(() => {
  $("run").disabled = false;
});

// The page: sends requests as JSON and shows the events that come back, a line of JSON each.
"use strict";

const $ = (id) => document.getElementById(id);
const BUSY = ["draw", "redraw", "compare", "batch"];
const picture = $("picture").getContext("2d");
const mask = $("mask").getContext("2d");
let model = null, running = null, history = [];

function say(text, error = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", error);
}

// An empty field is left to the model; other text is sent as it is, and the server says what is wrong with it.
function options() {
  const found = {};
  for (const name of ["cfg", "top_k", "top_p", "temperature"]) {
    if ($(name).validity.badInput) found[name] = "no number";
    else if ($(name).value !== "") found[name] = Number($(name).value);
  }
  return found;
}

const asked = () => ({ label: Number($("label").value), seed: $("seed").value === "" ? null : Number($("seed").value), ...options() });

// One request at a time; `shows` is given each event.
async function request(what, body, shows) {
  if (running) return;
  running = new AbortController();
  for (const id of BUSY) $(id).disabled = true;
  $("stop").disabled = false;
  say("asking ...");
  let ended = false;
  const take = (event) => {
    if (event.event === "queued") say(event.position ? `in the queue: ${event.position} before you` : "drawing ...");
    else if (event.event === "error") throw new Error(event.message);
    else if (event.event === "done") {
      ended = true;
      say(event.seconds === undefined ? "done" : `done in ${event.seconds.toFixed(2)} s`);
    }
    return shows(event);
  };
  try {
    const answer = await fetch(`api/${what}`, {
      method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body), signal: running.signal,
    });
    if (!answer.ok) {
      const text = await answer.text();
      let told = text;
      try { told = JSON.parse(text).message; } catch { /* not of the application */ }
      throw new Error(told);
    }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) await take(JSON.parse(line));
    }
    if (!ended) throw new Error("the server ended the drawing: try again");
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else say(error.message, true);
  } finally {
    running = null;
    for (const id of BUSY) $(id).disabled = false;
    $("stop").disabled = true;
  }
}

function figure(strip, source, caption) {
  const box = document.createElement("figure"), image = document.createElement("img"), text = document.createElement("figcaption");
  image.src = source;
  image.alt = text.textContent = caption;
  box.append(image, text);
  strip.append(box);
}

async function paint(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  picture.clearRect(0, 0, model.side, model.side);
  picture.drawImage(image, 0, 0);
  $("save").href = source;
}

const now = () => $("picture").toDataURL("image/png");

function keep() {
  history.push(now());
  history = history.slice(-10);
  $("undo").disabled = false;
}

async function stage(event) {
  if (event.event !== "stage") return;
  if (event.scale === 1) $("stages").replaceChildren();
  figure($("stages"), event.image, `${event.side} x ${event.side}`);
  await paint(event.image);
}

// White where painted, black elsewhere, as the server reads a mask.
function painted() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = model.side;
  const context = canvas.getContext("2d"), strokes = mask.getImageData(0, 0, model.side, model.side);
  for (let i = 0; i < strokes.data.length; i += 4) {
    strokes.data.fill(strokes.data[i + 3] >= 128 ? 255 : 0, i, i + 3);
    strokes.data[i + 3] = 255;
  }
  context.putImageData(strokes, 0, 0);
  return canvas.toDataURL("image/png");
}

function brush(event) {
  if (!event.buttons) return;
  const box = $("mask").getBoundingClientRect(), scale = model.side / box.width;
  mask.fillStyle = "#ff2d55";
  mask.beginPath();
  mask.arc((event.clientX - box.left) * scale, (event.clientY - box.top) * scale, Math.max(0.75, ($("brush").value / 200) * model.side), 0, 7);
  mask.fill();
}

$("mask").addEventListener("pointerdown", (event) => { $("mask").setPointerCapture(event.pointerId); brush(event); });
$("mask").addEventListener("pointermove", brush);
$("clear").onclick = () => mask.clearRect(0, 0, model.side, model.side);
$("invert").onclick = () => {
  mask.globalCompositeOperation = "xor";
  mask.fillStyle = "#ff2d55";
  mask.fillRect(0, 0, model.side, model.side);
  mask.globalCompositeOperation = "source-over";
};
$("undo").onclick = async () => {
  await paint(history.pop());
  $("undo").disabled = !history.length;
};
$("open").onchange = async () => {
  const file = $("open").files[0];
  if (!file) return;
  try {
    const image = await createImageBitmap(file), side = Math.min(image.width, image.height);
    keep();
    picture.imageSmoothingQuality = "high";
    picture.drawImage(image, (image.width - side) / 2, (image.height - side) / 2, side, side, 0, 0, model.side, model.side);
    $("save").href = now();
    image.close();
  } catch {
    say(`${file.name} is no picture that this browser reads: take a PNG or a JPEG`, true);
  }
  $("open").value = "";
};
$("dice").onclick = () => { $("seed").value = Math.floor(Math.random() * 2 ** 32); };
$("stop").onclick = () => running && running.abort();

$("controls").noValidate = true;  // the server checks, with one message for all
$("controls").onsubmit = (event) => {
  event.preventDefault();
  if (!running) keep();
  request("draw", asked(), stage);
};
$("redraw").onclick = () => {
  const body = { ...asked(), image: now(), mask: painted(), paste: $("paste").checked };
  keep();
  request("edit", body, stage);
};
$("compare").onclick = () => {
  $("compared").replaceChildren();
  const precisions = [...document.querySelectorAll("#precisions input:checked")].map((each) => each.value);
  request("compare", { ...asked(), precisions }, (event) => {
    if (event.event !== "compared") return;
    const off = event.precision === precisions[0] ? "" : `, off by ${event.off.toFixed(1)} of 255`;
    figure($("compared"), event.image, `${event.precision}: ${(1000 * event.seconds).toFixed(0)} ms${off}`);
  });
};
$("batch").onclick = () => {
  $("drawn").replaceChildren();
  $("sheet").hidden = true;
  const labels = [...$("labels").selectedOptions].map((each) => Number(each.value));
  const { label, ...others } = asked();
  request("batch", { ...others, labels: labels.length ? labels : [label], count: Number($("count").value) }, (event) => {
    if (event.event === "image") figure($("drawn"), event.image, `${$("label").options[event.label].text}, ${event.seed}`);
    if (event.event === "sheet") { $("sheet").href = event.image; $("sheet").hidden = false; }
  });
};

async function start() {
  model = await (await fetch("api/model")).json();
  $("name").textContent = document.title = model.name;
  $("about").textContent = `${model.side} x ${model.side} pixels, ${model.scales.length} scales, ${model.precision} on ${model.device}`;
  [...model.classes, "no class"].forEach((name, i) => {
    for (const id of ["label", "labels"]) $(id).add(new Option(name, i));
  });
  for (const name of ["cfg", "top_k", "top_p", "temperature"]) $(name).placeholder = model.defaults[name];
  const { cfg, top_k, top_p } = model.editing;
  $("editing").textContent = `Of redraws: guidance ${cfg}, top-k ${top_k}, top-p ${top_p}.`;
  for (const canvas of [$("picture"), $("mask")]) canvas.width = canvas.height = model.side;
  picture.fillStyle = "#888";
  picture.fillRect(0, 0, model.side, model.side);
  for (const name of model.precisions) {
    const label = document.createElement("label"), box = document.createElement("input");
    label.className = "check";
    Object.assign(box, { type: "checkbox", value: name, checked: true });
    label.append(box, name);
    $("precisions").append(label);
  }
  say("ready");
}
start().catch((error) => say(error.message, true));

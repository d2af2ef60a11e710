/** Modes, requests and their errors, the gallery, the address bar. */

import { Easel } from "./easel.js";
import { Form } from "./form.js";
import { openDrawn, openPicture } from "./picture.js";
import { Refusal, events, readModel } from "./service.js";
import { Queue, Stage, finished, named } from "./stage.js";

const $ = (id) => document.getElementById(id);
const KEPT = 240; // pictures in the gallery
const KEPT_WHOLE = 48; // of these with what they were after each scale

let model, form, stage;
let mode = "draw";
let view = "empty"; // what the stage shows: "empty", "tiles" or "easel"
let job = null; // the AbortController of what is being drawn
let running = null; // what ends when it has been drawn, or stopped
let source = null; // {send, view}: the picture that is edited
let beforeShown = false;
let retry = () => {};
const gallery = []; // newest first

const easel = new Easel($("mask"), $("cursor"), (share) => {
  const percent = Math.round(100 * share);
  const some = share > 0 ? `${Math.max(1, percent)} % is marked.` : "Nothing is marked yet.";
  $("marked").textContent = some;
});

async function start() {
  hush();
  try {
    model = await readModel();
  } catch (error) {
    tell(error, start);
    return;
  }
  form = new Form(model);
  stage = new Stage(model, refresh);
  $("about").textContent = `${model.name} · ${model.side} × ${model.side} · ${model.precision}`;
  $("about").title = `on ${model.backend}, bundle ${model.digest.slice(0, 12)}`;
  document.title = `${model.name} – var-deploy`;
  $("edit-mode").hidden = !model.editing;
  $("size").max = Math.max(2, model.side / 2);
  $("size").value = Math.max(1, Math.round(model.side / 6));
  easel.resize(model.side);
  sizeBrush();
  $("settings").open = matchMedia("(min-width: 900px)").matches;
  const linked = form.parse(location.search);
  if (linked) form.write(linked);
  else form.newSeed();
  listen();
  refresh();
  document.body.dataset.ready = "";
  if (linked) await run();
}

// drawing

function run() {
  return (running = draw());
}

async function draw() {
  const settings = form.read();
  const kind = mode;
  if (kind === "edit" && !source) return complain("Choose a picture to edit first.");
  if (kind === "edit" && easel.share === 0) return complain("Mark what to draw anew first.");
  hush();
  const former = { view, set: stage.set, solo: stage.solo };
  const mine = (job = new AbortController());
  const seeds = Array.from({ length: settings.count }, (_, n) => settings.seed + n);
  const before = kind === "edit" ? source.view.toDataURL() : null;
  const common = { kind, settings, before, label: settings.label, png: null };
  const blank = (seed) => ({ ...common, seed, scales: [] });
  const set = { kind, pictures: seeds.map(blank) };
  if (kind === "draw") history.replaceState(null, "", form.query(settings));
  else for (const picture of set.pictures) picture.scales.push(before);
  view = "tiles";
  stage.show(set);
  for (const picture of set.pictures) picture.scales.length = 0;
  refresh();
  reveal();
  say("Drawing.");
  $("caption").textContent = "Drawing…";
  const queue = new Queue();
  const playing = stage.play(queue, mine.signal);
  try {
    const path = kind === "draw" ? "v1/images/stream" : "v1/edit/stream";
    const body = kind === "draw" ? bodyOfDraw(settings, seeds) : bodyOfEdit(settings, seeds);
    let answer = null;
    for await (const [name, data] of events(path, body, mine.signal)) {
      if (name === "queued") told(data.position);
      if (name === "scale") queue.add(data);
      if (name === "done") answer = data;
    }
    queue.close();
    await playing;
    finish(set, answer); // which is here, though somebody may have stopped the showing
  } catch (error) {
    queue.close();
    if (!mine.signal.aborted) tell(error, run);
    mine.abort();
  }
  job = null;
  if (!finished(set)) {
    view = former.view;
    stage.show(former.set, former.solo);
    if (mine.signal.reason === "stopped") say("Stopped.");
  }
  refresh();
}

function told(position) {
  const others = position === 1 ? "1 request is" : `${position} requests are`;
  if (position > 0) $("caption").textContent = `Waiting: ${others} before this one.`;
}

function sampling({ cfg, top_k, top_p, temperature }) {
  const given = Object.entries({ cfg, top_k, top_p, temperature });
  return Object.fromEntries(given.filter(([, value]) => value != null));
}

/** A seed of its own for each picture: each can be drawn again alone. */
function bodyOfDraw(settings, seed) {
  const labels = settings.label === null ? null : [settings.label];
  return { labels, count: settings.count, seed, ...sampling(settings) };
}

function bodyOfEdit(settings, seed) {
  const { label, count } = settings;
  const pictures = { image: source.send, mask: easel.toDataURL() };
  return { ...pictures, label, count, seed, keep_pixels: $("keep").checked, ...sampling(settings) };
}

function finish(set, answer) {
  answer.images.forEach(({ png, label, seed }, n) => {
    Object.assign(set.pictures[n], { png: `data:image/png;base64,${png}`, label, seed });
    set.pictures[n].seconds = answer.seconds;
  });
  stage.show(set);
  for (const picture of set.pictures) keep(picture);
  say(`Done: ${set.pictures.map(named).join("; ")}.`);
}

// what is on the page

function refresh() {
  const editing = mode === "edit";
  $("tools").hidden = !editing;
  $("painting").hidden = !source;
  $("empty").hidden = view !== "empty";
  $("tiles").hidden = view !== "tiles";
  $("easel").hidden = view !== "easel";
  $("empty-text").textContent = editing
    ? "Choose a picture, drop one here, or paste it."
    : "Choose what to draw, and watch it appear from coarse to fine.";
  $("draw").textContent = job ? "Stop" : editing ? "Fill" : "Draw";
  $("another").disabled = job !== null;
  $("panel").setAttribute("aria-busy", String(job !== null));
  const { set, current } = stage;
  const ready = view === "tiles" && set !== null && !job;
  $("strip").hidden = $("caption").hidden = view === "easel";
  $("mask-keys").hidden = view !== "easel";
  $("actions").hidden = !ready;
  $("all").hidden = !ready || set.pictures.length === 1 || stage.solo === null;
  $("replay").hidden = !ready || !set.pictures.some((picture) => picture.scales.length);
  $("back").hidden = !ready || !source || !editing;
  for (const id of ["download", "edit-this", "copy-link", "before"]) $(id).hidden = !current;
  beforeShown = false;
  $("before").setAttribute("aria-pressed", "false");
  if (current) {
    $("edit-this").hidden = !model.editing;
    $("copy-link").hidden = current.kind === "edit";
    $("before").hidden = !current.before;
    $("download").href = current.png ?? "#";
    $("download").download = `${named(current).replace(/[^\p{L}\p{N}]+/gu, "-")}.png`;
  }
  if (!job) $("caption").textContent = caption();
}

function caption() {
  const { set, current, scale } = stage;
  if (view !== "tiles" || !set) return "";
  if (!current) return `${set.pictures.length} pictures. Choose one to look at it closely.`;
  if (scale !== null) {
    const patches = `${model.patch_nums[scale]} × ${model.patch_nums[scale]}`;
    return `After scale ${scale + 1} of ${model.scales}: ${patches} tokens`;
  }
  const took = set.pictures.length === 1 && current.seconds !== undefined;
  return named(current) + (took ? `, drawn in ${current.seconds.toFixed(2)} s` : "");
}

function say(text) {
  $("status").textContent = text;
}

function tell(error, again) {
  const known = error instanceof Refusal;
  if (!known) console.error(error);
  retry = again;
  complain(known ? error.message : "Something went wrong on this page.", known && error.retry);
}

function complain(text, canRetry = false) {
  $("notice-text").textContent = text;
  $("again").hidden = !canRetry;
  $("notice").hidden = false;
  document.querySelector(".go").scrollIntoView({ block: "nearest" });
}

function hush() {
  $("notice").hidden = true;
  $("notice-text").textContent = "";
}

// editing

function setMode(wanted) {
  if (mode === "draw" && wanted === "edit") $("settings").open = false; // the tools need the room
  mode = wanted;
  document.querySelector(`[name=mode][value=${wanted}]`).checked = true;
  form.setMode(wanted);
  hush();
  if (wanted === "draw") view = stage.set ? "tiles" : "empty";
  else view = source ? "easel" : "empty";
  refresh();
}

async function edit(open) {
  stop();
  await running;
  try {
    source = await open();
  } catch (error) {
    complain(error.message);
    return;
  }
  const canvas = $("source");
  canvas.width = canvas.height = model.side;
  canvas.getContext("2d").drawImage(source.view, 0, 0);
  easel.resize(model.side);
  setMode("edit");
  say("The picture is ready: mark what to draw anew.");
}

const editFile = (file) => edit(() => openPicture(file, model.side, model.limits));
const editDrawn = (picture) => edit(() => openDrawn(picture.png, model.side));

function sizeBrush() {
  easel.size = $("size").valueAsNumber;
  $("size-text").textContent = `${easel.size} px`;
}

// the gallery

function keep(picture) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const image = document.createElement("img");
  Object.assign(image, { src: picture.png, alt: named(picture) });
  button.type = "button";
  button.title = named(picture);
  button.append(image);
  button.addEventListener("click", () => reopen(picture));
  item.append(button);
  $("gallery").prepend(item);
  gallery.unshift(picture);
  if (gallery.length > KEPT) {
    gallery.pop();
    $("gallery").lastChild.remove();
  }
  if (gallery.length > KEPT_WHOLE) gallery[KEPT_WHOLE].scales = [];
}

function reopen(picture) {
  if (job) return;
  if (picture.kind === "draw") {
    const settings = { ...picture.settings, seed: picture.seed, count: 1 };
    setMode("draw");
    form.write(settings);
    history.replaceState(null, "", form.query(settings));
  }
  view = "tiles";
  stage.show({ kind: picture.kind, pictures: [picture] });
  reveal();
}

/** Bring the picture into sight, which a phone may have scrolled away. */
function reveal() {
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  $("stage").scrollIntoView({ block: "nearest", behavior });
}

async function copyLink() {
  const { settings, seed } = stage.current;
  const address = new URL(form.query({ ...settings, seed, count: 1 }), location.href).href;
  try {
    await navigator.clipboard.writeText(address);
    say("The link is copied.");
    $("caption").textContent = "The link is copied.";
  } catch {
    history.replaceState(null, "", address);
    complain("The browser keeps the clipboard closed here; the link is in the address bar.");
  }
}

function toggleBefore() {
  const image = $("tiles").querySelector(".tile:not([hidden]) img:not(.ghost)");
  beforeShown = !beforeShown;
  image.src = beforeShown ? stage.current.before : stage.current.png;
  $("before").setAttribute("aria-pressed", String(beforeShown));
}

function stop() {
  job?.abort("stopped");
}

function listen() {
  const click = (id, action) => $(id).addEventListener("click", action);
  $("panel").addEventListener("submit", (event) => {
    event.preventDefault();
    if (job) stop();
    else run();
  });
  click("another", () => {
    form.newSeed();
    $("panel").requestSubmit();
  });
  click("again", () => !job && retry());
  click("defaults", () => form.reset());
  click("all", () => stage.look(null));
  click("replay", () => stage.replay());
  click("edit-this", () => editDrawn(stage.current));
  click("copy-link", copyLink);
  click("before", toggleBefore);
  click("back", () => setMode("edit"));
  click("upload", () => $("file").click());
  click("invert", () => easel.invert());
  click("clear", () => easel.clear());
  click("undo", () => easel.undo());
  $("size").addEventListener("input", sizeBrush);
  $("file").addEventListener("change", () => {
    if ($("file").files.length) editFile($("file").files[0]);
    $("file").value = "";
  });
  $("region").addEventListener("change", () => {
    if ($("region").value) easel.region($("region").value);
    $("region").value = "";
  });
  for (const radio of document.getElementsByName("tool")) {
    radio.addEventListener("change", () => (easel.tool = radio.value));
  }
  for (const radio of document.getElementsByName("mode")) {
    radio.addEventListener("change", () => {
      const drawn = view === "tiles" && !job ? stage.current : null;
      if (radio.value === "edit" && !source && drawn) editDrawn(drawn);
      else if (!job) setMode(radio.value);
      else document.querySelector(`[name=mode][value=${mode}]`).checked = true;
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && stage.solo !== null) stage.look(null);
  });
  if (!model.editing) return;
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) editFile(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) editFile(event.clipboardData.files[0]);
  });
}

start();

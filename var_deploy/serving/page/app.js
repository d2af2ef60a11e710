/** Start, modes, requests and their errors; what is shown when; the address bar. */

import { Form } from "./form.js";
import { Gallery, download, fileNameOf, nameOf } from "./gallery.js";
import { MaskEditor } from "./mask_editor.js";
import { openGenerated, openPicture } from "./picture.js";
import { PictureStore } from "./picture_store.js";
import { Progress, seconds } from "./progress.js";
import { editRequest, generateRequest, varyRequest } from "./requests.js";
import { Refusal, events, readModel } from "./service.js";
import { EventQueue, Viewer, finished } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const VARIATIONS = 4; // pictures that "More like this" makes
const FIELDS = "textarea, input:not([type=range], [type=radio], [type=checkbox])";
const TOLD_AGAIN = 10; // seconds after which a screen reader hears how far a request is

let model, form, viewer, gallery;
let mode = "generate";
let view = "empty"; // what is shown: "empty", "tiles" or "mask-editor"
let running = null; // {controller, progress, ended}: the request that the service works on
let source = null; // {send, view}: the picture that is edited
let older = null; // the picture of the history that is shown
let beforeShown = false;
let retry = () => {};

const maskEditor = new MaskEditor($("mask"), $("cursor"), ({ share, canUndo, canRedo }) => {
  const percent = Math.max(1, Math.round(100 * share));
  $("marked").textContent = share > 0 ? `${percent} % is marked.` : "Nothing is marked yet.";
  $("undo").setAttribute("aria-disabled", String(!canUndo));
  $("redo").setAttribute("aria-disabled", String(!canRedo));
});

async function start() {
  $("empty-text").textContent = "Asking the service for its model…";
  try {
    model = await readModel();
  } catch (error) {
    $("empty-text").textContent = "Which model is served is not known.";
    showError(error, start);
    return;
  }
  hideNotice();
  form = new Form(model, showNotice);
  viewer = new Viewer(model, refresh);
  gallery = new Gallery(new PictureStore(), openOlder);
  $("about").textContent = `${model.name} · ${model.width} × ${model.height} · ${model.precision}`;
  $("about").title = `on ${model.backend}, bundle ${model.digest.slice(0, 12)}`;
  document.title = `${model.name} – var-deploy`;
  $("edit-mode").hidden = !model.editing;
  const side = Math.min(model.width, model.height);
  $("size").max = Math.max(2, side / 2);
  $("size").value = Math.max(1, Math.round(side / 6));
  maskEditor.resize(model.width, model.height);
  sizeBrush();
  offerScales();
  $("settings").open = matchMedia("(min-width: 900px)").matches;
  const linked = form.parse(location.search);
  if (linked) form.write(linked.settings);
  if (linked?.settings.seed == null) form.newSeed();
  listen();
  for (const id of ["controls", "generate", "another"]) $(id).disabled = false;
  $("settings").hidden = $("history").hidden = false;
  refresh();
  document.body.dataset.ready = "";
  gallery.load(model.digest).then(() => (document.body.dataset.history = ""));
  if (linked?.unclear.length) showNotice(unclearLabels(linked.unclear));
  else if (linked && linked.settings.seed !== null) await send();
}

/** What is wrong with labels of a link, each {label, numbers} with the classes it may mean. */
function unclearLabels(labels) {
  const quoted = labels.map(({ label }) => `“${label}”`).join(" and ");
  if (model.takes === "prompts") return `The link names ${quoted}, but this model takes prompts.`;
  if (!model.conditional) return `The link names ${quoted}, but this model has no classes.`;
  const several = labels.find(({ numbers }) => numbers.length > 1);
  if (several) {
    const which = several.numbers.map((n) => `${form.classes.nameOf(n)} (${n})`).join(" or ");
    return `The link's “${several.label}” may be ${which}. Choose one.`;
  }
  const which = labels.length === 1 ? "class" : "classes";
  return `The link names the ${which} ${quoted}, which this model does not have. Choose another.`;
}

// requests

/** Send what the form asks for, or say what is missing. */
function send() {
  const settings = form.read();
  if (form.problem) {
    showNotice(form.problem);
    form.focus();
  } else if (mode === "generate") {
    history.replaceState(null, "", form.query(settings));
    return perform(generateRequest(form.classes, settings));
  } else if (!source) showNotice("Choose a picture to edit first.");
  else if (maskEditor.share === 0) showNotice("Mark what to fill first.");
  else {
    const mask = maskEditor.toDataURL();
    return perform(editRequest(form.classes, settings, source, mask, $("keep").checked));
  }
}

/** More like the picture that is shown: with its settings, and seeds of their own. */
function sendVariation() {
  const picture = viewer.current;
  const seed = Math.floor(Math.random() * 1e6);
  const count = Math.min(VARIATIONS, model.limits.count);
  const settings = { ...picture.settings, seed, count };
  const fromScale = Number($("from-scale").value);
  return perform(varyRequest(form.classes, settings, picture, fromScale));
}

function perform(request) {
  const progress = new Progress(model, request.pictures.length);
  running = { controller: new AbortController(), progress };
  return (running.ended = execute(request, running));
}

/** Have a request answered, and show what comes. */
async function execute(request, { controller, progress }) {
  const { signal } = controller;
  const former = { view, set: viewer.set, solo: viewer.solo, older };
  const set = { kind: request.kind, pictures: request.pictures.map((picture) => ({ ...picture })) };
  hideNotice();
  form.remark([], []);
  older = null;
  view = "tiles";
  for (const picture of set.pictures) if (picture.before) picture.scales = [picture.before];
  viewer.show(set); // from what is there, an edit or a variation grows
  for (const picture of set.pictures) picture.scales = [];
  refresh();
  reveal();
  say("Generating…");
  const showing = showProgress(progress);
  const queue = new EventQueue();
  const playing = viewer.play(queue, signal, (scale) => {
    if (showing.ended) $("caption").textContent = `Scale ${scale + 1} of ${model.scales}`;
  });
  try {
    let answer = null;
    for await (const [name, data] of events(request.path, request.body, signal)) {
      if (name === "queued") progress.queued(data);
      if (name === "scale") progress.scaleDone(data);
      if (name === "scale") queue.add(data);
      if (name === "done") answer = data;
      showing.now();
    }
    showing.end();
    queue.close();
    await playing;
    finish(set, answer); // which is here, though somebody may have stopped the showing
  } catch (error) {
    queue.close();
    if (!signal.aborted) showError(error, () => perform(request));
    controller.abort();
  }
  showing.end();
  running = null;
  if (!finished(set)) {
    ({ view, older } = former);
    viewer.show(former.set, former.solo);
    if (signal.reason === "stopped") say(stopped(progress));
    else say("");
  }
  refresh();
}

function stopped({ elapsed, scale }) {
  const where = scale === null ? "before its turn" : `at scale ${scale + 1} of ${model.scales}`;
  return `Stopped after ${elapsed.toFixed(1)} s, ${where}; nothing was kept.`;
}

/** Text and bar of a request that is under way, until `end` is called. */
function showProgress(progress) {
  let told = performance.now();
  const now = () => {
    $("caption").textContent = progress.text;
    viewer.markScale(progress.scale);
    const { fraction } = progress;
    if (fraction === null) $("progress").removeAttribute("value");
    else $("progress").value = fraction;
    $("progress").hidden = progress.elapsed < 1 && !(progress.expected > 1.5);
    if (performance.now() - told < TOLD_AGAIN * 1000) return;
    told = performance.now();
    say(`${progress.text}.`);
  };
  const timer = setInterval(now, 250);
  const showing = {
    now,
    ended: false,
    end() {
      clearInterval(timer);
      showing.ended = $("progress").hidden = true;
      viewer.markScale(null);
    },
  };
  now();
  return showing;
}

function finish(set, answer) {
  answer.images.forEach(({ png, label, seed }, n) => {
    const made = { png: `data:image/png;base64,${png}`, label, seed, digest: model.digest };
    Object.assign(set.pictures[n], made, { seconds: answer.seconds, sampling: answer.settings });
  });
  form.remark(answer.remarks, answer.unknown);
  viewer.show(set);
  for (const picture of set.pictures) gallery.add(picture);
  const { pictures } = set;
  const what = pictures.length > 1 ? `${pictures.length} pictures` : nameOf(pictures[0]);
  say(`Done in ${duration(answer.seconds)}: ${what}.`);
}

const duration = (value) => (value < 10 ? `${value.toFixed(2)} s` : seconds(Math.round(value)));

function stop() {
  running?.controller.abort("stopped");
}

// what is on the page

function refresh() {
  const focused = document.activeElement;
  const editing = mode === "edit";
  const busy = running !== null;
  $("tools").hidden = !editing;
  $("painting").hidden = !source;
  $("empty").hidden = view !== "empty";
  $("tiles").hidden = view !== "tiles";
  $("mask-editor").hidden = view !== "mask-editor";
  $("empty-text").textContent = editing
    ? "Choose a picture, drop one here, or paste it."
    : model?.takes === "prompts"
      ? "Say what to see, and watch it appear from coarse to fine."
      : "Choose a class, and watch it appear from coarse to fine.";
  $("generate").textContent = busy ? "Stop" : editing ? "Fill" : "Generate";
  $("another").setAttribute("aria-disabled", String(busy)); // keeps the focus, unlike `disabled`
  $("panel").setAttribute("aria-busy", String(busy));
  $("strip").hidden = $("caption").hidden = view === "mask-editor";
  $("mask-keys").hidden = view !== "mask-editor";
  refreshActions();
  if (!busy) $("caption").textContent = caption();
  // what had the focus may be gone: then it goes on where the work does
  if (focused !== document.body && !focused.checkVisibility()) home().focus({ preventScroll: true });
}

function refreshActions() {
  const { set, current } = viewer;
  const ready = view === "tiles" && set !== null && running === null;
  const several = ready && set.pictures.length > 1;
  $("actions").hidden = !ready;
  $("show-all").hidden = !several || viewer.solo === null;
  $("download-set").hidden = !several || viewer.solo !== null;
  $("download-set").textContent = `Download all ${set?.pictures.length}`;
  $("replay").hidden = !ready || !set.pictures.some((picture) => picture.scales.length);
  $("back").hidden = !ready || !source || mode !== "edit";
  $("use-settings").hidden = !current || current !== older;
  $("download").hidden = !current;
  $("edit-this").hidden = !current || !model.editing;
  $("vary-box").hidden = !current || !model.editing || model.scales < 2;
  $("copy-link").hidden = current?.kind !== "generate";
  $("before").hidden = !current?.before;
  beforeShown = false;
  $("before").setAttribute("aria-pressed", "false");
  if (!current) return;
  $("download").href = current.png ?? "#";
  $("download").download = fileNameOf(current);
  // after looking at a scale: that one stays, and the next one is new
  if (viewer.scale !== null) $("from-scale").value = viewer.scale + 1;
}

/** Where the work goes on. */
function home() {
  if (view === "mask-editor") return $("mask");
  return $("generate");
}

function caption() {
  const { set, current, scale } = viewer;
  if (view !== "tiles" || !set) return "";
  if (!current) return `${set.pictures.length} pictures. Choose one to look at it closely.`;
  if (scale !== null) {
    const [rows, columns] = model.grids[scale];
    return `After scale ${scale + 1} of ${model.scales}: ${columns} × ${rows} tokens`;
  }
  const took = set.pictures.length === 1 && current.seconds !== undefined;
  const time = took ? `, in ${duration(current.seconds)}` : "";
  return [nameOf(current) + time, ...form.describe(current.settings)].join(" · ");
}

function say(text) {
  $("status").textContent = text;
}

function showError(error, again) {
  const known = error instanceof Refusal;
  if (!known) console.error(error);
  retry = again;
  showNotice(known ? error.message : "Something went wrong on this page.", known && error.retry);
}

function showNotice(text, canRetry = false) {
  $("notice-text").textContent = text;
  $("again").hidden = !canRetry;
  $("notice").hidden = false;
  document.querySelector(".go").scrollIntoView({ block: "nearest" });
}

function hideNotice() {
  const focused = document.activeElement === $("again");
  $("notice").hidden = true;
  $("notice-text").textContent = "";
  if (focused) $("generate").focus();
}

/** Bring the picture into sight, which a phone may have scrolled away. */
function reveal() {
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  $("viewer").scrollIntoView({ block: "nearest", behavior });
}

function offerScales() {
  const options = model.grids.map((_, k) => new Option(`from scale ${k + 1}`, k));
  $("from-scale").replaceChildren(...options.slice(1)); // from the first on it is another picture
  $("from-scale").value = Math.ceil(model.scales / 2);
}

// editing

function setMode(wanted) {
  if (mode === wanted && view !== "tiles") return refresh();
  if (mode === "generate" && wanted === "edit") $("settings").open = false; // tools need the room
  mode = wanted;
  document.querySelector(`[name=mode][value=${wanted}]`).checked = true;
  form.setMode(wanted);
  hideNotice();
  if (wanted === "generate") view = viewer.set ? "tiles" : "empty";
  else view = source ? "mask-editor" : "empty";
  refresh();
}

async function edit(open) {
  stop();
  await running?.ended;
  try {
    source = await open();
  } catch (error) {
    showNotice(error.message);
    return;
  }
  const canvas = $("source");
  canvas.width = model.width;
  canvas.height = model.height;
  canvas.getContext("2d").drawImage(source.view, 0, 0);
  maskEditor.resize(model.width, model.height);
  view = "tiles"; // whatever it was, the mask editor takes its place
  setMode("edit");
  if (document.activeElement?.name !== "mode") $("mask").focus({ preventScroll: true });
  say("The picture is ready: mark what to fill.");
}

const editFile = (file) => edit(() => openPicture(file, model));
const editGenerated = (picture) => edit(() => openGenerated(picture.png, model));

function sizeBrush() {
  maskEditor.size = $("size").valueAsNumber;
  $("size-text").textContent = `${maskEditor.size} px`;
}

// the history

function openOlder(picture) {
  if (running) return;
  older = picture;
  view = "tiles";
  viewer.show({ kind: picture.kind, pictures: [picture] });
  reveal();
  say(`${nameOf(picture)} is shown; your settings are unchanged.`);
}

async function useSettings() {
  const { settings, kind, before } = older;
  if (kind === "edit") await edit(() => openGenerated(before, model));
  else setMode("generate");
  form.write(settings);
  if (kind === "generate") history.replaceState(null, "", form.query(settings));
  older = null;
  refresh();
  say("The settings are those of this picture.");
}

async function copyLink() {
  const address = new URL(form.query(viewer.current.settings), location.href).href;
  try {
    await navigator.clipboard.writeText(address);
    say("The link is copied.");
  } catch {
    history.replaceState(null, "", address);
    showNotice("The browser keeps the clipboard closed here; the link is in the address bar.");
  }
}

function toggleBefore() {
  const image = $("tiles").querySelector(".tile:not([hidden]) img:not(.former)");
  beforeShown = !beforeShown;
  image.src = beforeShown ? viewer.current.before : viewer.current.png;
  $("before").setAttribute("aria-pressed", String(beforeShown));
}

function showAll() {
  const n = viewer.solo;
  viewer.look(null);
  $("tiles").children[n].focus();
}

// events

function listen() {
  const click = (id, action) =>
    $(id).addEventListener("click", () => $(id).ariaDisabled !== "true" && action());
  $("panel").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) stop();
    else send();
  });
  // the second click of a double click would stop what the first one has begun
  $("generate").addEventListener("click", (event) => event.detail > 1 && event.preventDefault());
  // as in a field of one line; Shift+Enter, and a phrase that is still being composed, stay in it
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running && !event.repeat) $("panel").requestSubmit();
  });
  click("another", () => {
    form.newSeed();
    $("panel").requestSubmit();
  });
  click("defaults", () => form.resetSampling());
  click("use-settings", useSettings);
  click("show-all", showAll);
  click("download-set", () => download(viewer.set.pictures, "pictures.zip"));
  click("replay", () => viewer.replay());
  click("edit-this", () => editGenerated(viewer.current));
  click("vary", sendVariation);
  click("copy-link", copyLink);
  click("before", toggleBefore);
  click("back", () => setMode("edit"));
  click("upload", () => $("file").click());
  click("invert", () => maskEditor.invert());
  click("clear", () => maskEditor.clear());
  click("undo", () => maskEditor.undo());
  click("redo", () => maskEditor.redo());
  $("size").addEventListener("input", sizeBrush);
  $("file").addEventListener("change", () => {
    if ($("file").files.length) editFile($("file").files[0]);
    $("file").value = "";
  });
  $("region").addEventListener("change", () => {
    if ($("region").value) maskEditor.region($("region").value);
    $("region").value = "";
  });
  for (const radio of document.getElementsByName("tool")) {
    radio.addEventListener("change", () => (maskEditor.tool = radio.value));
  }
  for (const radio of document.getElementsByName("mode")) {
    radio.addEventListener("change", () => changeMode(radio.value));
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && viewer.solo !== null) viewer.look(null);
    else undoByKey(event);
  });
  if (!model.editing) return;
  // text that is dropped belongs to the field that it is dropped on
  const withFile = (event) => event.dataTransfer.types.includes("Files");
  document.addEventListener("dragover", (event) => withFile(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!withFile(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files.length) editFile(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) editFile(event.clipboardData.files[0]);
  });
}

/** A picture that is shown is what is edited first. */
function changeMode(wanted) {
  const shown = view === "tiles" && !running ? viewer.current : null;
  if (running) document.querySelector(`[name=mode][value=${mode}]`).checked = true;
  else if (wanted === "edit" && !source && shown) editGenerated(shown);
  else setMode(wanted);
}

/** Ctrl+Z and its kin are the mask's while it is shown, but for fields, which have their own. */
function undoByKey(event) {
  const { key, target } = event;
  const typing = target.matches?.(FIELDS);
  if (view !== "mask-editor" || typing || !(event.ctrlKey || event.metaKey) || event.altKey) return;
  const letter = key.toLowerCase();
  if (letter === "z" && !event.shiftKey) maskEditor.undo();
  else if (letter === "y" || letter === "z") maskEditor.redo();
  else return;
  event.preventDefault();
}

$("again").addEventListener("click", () => running || retry());
start();

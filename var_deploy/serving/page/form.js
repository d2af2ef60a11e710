/**
 * Classes or a prompt, seed, number of pictures and sampling; and all of it as the query of an
 * address.
 */

import { ClassPicker } from "./class_picker.js";
import { Classes } from "./class_search.js";
import { PromptField } from "./prompt_field.js";
import { SamplingSliders } from "./sampling_sliders.js";

const NONE = { generate: "no class", edit: "whatever fits" };
const NO_LABEL = "none"; // in an address, "no class" among classes

const $ = (id) => document.getElementById(id);

/** A text as one line without control characters, which the service refuses. */
const plain = (text) => text.replace(/\p{Cc}+/gu, " ").trim();

export class Form {
  /** `onRefuse` is called with a sentence about what cannot be chosen. */
  constructor(model, onRefuse) {
    this.model = model;
    this.classes = new Classes(model.classes, model.labels ?? [], model.synonyms ?? []);
    this.sampling = new SamplingSliders(model);
    this.mode = "generate";
    // an edit has a choice of its own: the class of the picture need not be that of its new part
    this.choices = { generate: [0], edit: [null] };
    this.following = 1; // the number of pictures that the number of classes has led to
    $("count").max = model.limits.count;
    $("class-box").hidden = !model.conditional;
    this.words = model.takes === "prompts";
    $("prompt-box").hidden = !this.words;
    $("negative-box").hidden = !this.words || !model.guidance;
    for (const id of ["prompt", "negative"]) $(id).maxLength = model.limits.prompt;
    this.prompts = { generate: "", edit: "" }; // of the modes
    this.promptField = new PromptField(model.examples);
    if (!model.conditional) return;
    const onChange = (chosen) => this.#follow(chosen);
    this.picker = new ClassPicker(this.classes, model.limits.count, { onChange, onRefuse });
    if (!this.picker.few) this.picker.random();
    $("several").addEventListener("change", () => this.picker.setSeveral($("several").checked));
    $("several-box").hidden = model.limits.count < 2;
  }

  /**
   * What is asked for: `labels` are class numbers, with null for "no class"; `prompt` and
   * `negative` are there where the model takes prompts; a sampling setting that is null is the
   * model's default.
   */
  read() {
    const labels = this.picker?.chosen ?? [null];
    const [seed, count] = ["seed", "count"].map((id) => $(id).valueAsNumber);
    const said = this.words
      ? { prompt: plain($("prompt").value), negative: plain($("negative").value) }
      : {};
    return { labels, ...said, seed, count, ...this.sampling.read() };
  }

  /**
   * Say what the model did not read of the prompt: it was cut off, or has words that it does not
   * know, `unknown`, which are marked from then on.
   */
  remark(lines, unknown) {
    this.promptField.remark(lines, unknown);
  }

  /** What keeps the form from being sent, in a sentence, or null. */
  get problem() {
    const empty = this.words && this.mode === "generate" && !plain($("prompt").value);
    if (empty) return "Write what to generate first.";
    const text = this.picker?.pending;
    return text ? `No class is called “${text}”. Choose one from the list.` : null;
  }

  /** Go where the problem is. */
  focus() {
    $(this.words ? "prompt" : "class-text").focus();
  }

  write(settings) {
    if (this.words) {
      this.promptField.value = settings.prompt ?? "";
      $("negative").value = settings.negative ?? "";
    }
    if (this.picker) {
      this.picker.set(settings.labels, { several: false });
      $("several").checked = this.picker.several;
    }
    $("seed").value = settings.seed;
    $("count").value = settings.count;
    this.sampling.write(settings);
  }

  resetSampling() {
    this.sampling.write({});
  }

  /** What differs from the model's defaults, as a list of short texts. */
  describe(settings) {
    const without = settings.negative ? [`Without “${settings.negative}”`] : [];
    return [...without, ...this.sampling.describe(settings)];
  }

  newSeed() {
    $("seed").value = Math.floor(Math.random() * 1e6);
  }

  setMode(mode) {
    const editing = mode === "edit";
    const title = editing ? "What to put there" : "What to generate";
    $("class-title").textContent = $("prompt-title").textContent = title;
    if (this.words) {
      this.prompts[this.mode] = $("prompt").value;
      this.promptField.value = this.prompts[mode];
      this.promptField.suggest(editing ? NONE.edit : null);
    }
    if (this.picker) {
      this.choices[this.mode] = this.picker.chosen;
      this.mode = mode;
      this.picker.set(this.choices[mode], { several: false, noneText: NONE[mode] });
      $("several").checked = this.picker.several;
      $("several-box").hidden = editing || this.model.limits.count < 2;
    }
    this.mode = mode;
  }

  /** The query of an address that generates the same again. */
  query(settings) {
    const query = new URLSearchParams();
    const labels = settings.labels.map((number) => this.classes.labelOf(number));
    if (labels.length > 1 || labels[0] !== null) {
      for (const label of labels) query.append("label", label ?? NO_LABEL);
    }
    for (const name of ["prompt", "negative"]) {
      if (settings[name]) query.set(name, settings[name]);
    }
    query.set("seed", settings.seed);
    if (settings.count !== 1) query.set("count", settings.count);
    for (const name of this.sampling.names) {
      if (settings[name] != null) query.set(name, settings[name]);
    }
    return `?${query}`;
  }

  /**
   * {settings, unclear} of an address, or null where it says nothing. `settings.seed` may be null;
   * `unclear` are the labels that do not name one class, each {label, numbers}; a prompt for a
   * model of classes is one of them.
   */
  parse(text) {
    const query = new URLSearchParams(text);
    const number = (name) => (query.has(name) ? Number(query.get(name)) : null);
    if (!["seed", "label", "prompt"].some((name) => query.has(name))) return null;
    const seed = Number.isSafeInteger(number("seed")) && number("seed") >= 0 ? number("seed") : null;
    const named = [...query.getAll("label"), ...(this.words ? [] : query.getAll("prompt"))];
    const labels = named.map((label) => ({ label, numbers: this.#named(label) }));
    const unclear = labels.filter(({ numbers }) => numbers.length !== 1);
    const { limits } = this.model;
    const clear = labels.filter(({ numbers }) => numbers.length === 1);
    const known = [...new Set(clear.map(({ numbers }) => numbers[0]))];
    const settings = { seed, labels: known.slice(0, limits.count) };
    if (!settings.labels.length) settings.labels = [null];
    for (const name of this.words ? ["prompt", "negative"] : []) {
      const characters = [...plain(query.get(name) ?? "")]; // so that none is cut in half
      settings[name] = characters.slice(0, limits.prompt).join("");
    }
    const count = Number.isInteger(number("count")) ? number("count") : 1;
    settings.count = Math.min(Math.max(count, settings.labels.length), limits.count);
    for (const name of this.sampling.names) {
      settings[name] = Number.isFinite(number(name)) ? number(name) : null;
    }
    return { settings, unclear };
  }

  /** The classes that a label may mean, [null] for "no class". */
  #named(label) {
    if (!this.model.conditional) return [];
    const numbers = this.classes.named(label);
    return numbers.length || label.toLowerCase() !== NO_LABEL ? numbers : [null];
  }

  /** One picture for each class at least; where there were as many as classes, as many again. */
  #follow({ length }) {
    $("count").min = length;
    if ($("count").valueAsNumber === this.following || !($("count").valueAsNumber >= length)) {
      $("count").value = length;
    }
    this.following = length;
  }
}

/** Classes, seed, number of pictures and sampling; and all of it as the query of an address. */

import { ClassPicker } from "./class_picker.js";
import { Classes } from "./class_search.js";
import { SamplingSliders } from "./sampling_sliders.js";

const NONE = { generate: "no class", edit: "whatever fits" };
const NO_LABEL = "none"; // in an address, "no class" among classes

const $ = (id) => document.getElementById(id);

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
    if (!model.conditional) return;
    const onChange = (chosen) => this.#follow(chosen);
    this.picker = new ClassPicker(this.classes, model.limits.count, { onChange, onRefuse });
    if (!this.picker.few) this.picker.random();
    $("several").addEventListener("change", () => this.picker.setSeveral($("several").checked));
    $("several-box").hidden = model.limits.count < 2;
  }

  /**
   * What is asked for: `labels` are class numbers, with null for "no class"; a sampling setting
   * that is null is the model's default.
   */
  read() {
    const labels = this.picker?.chosen ?? [null];
    const [seed, count] = ["seed", "count"].map((id) => $(id).valueAsNumber);
    return { labels, seed, count, ...this.sampling.read() };
  }

  /** What keeps the form from being sent, in a sentence, or null. */
  get problem() {
    const text = this.picker?.pending;
    return text ? `No class is called “${text}”. Choose one from the list.` : null;
  }

  write(settings) {
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

  newSeed() {
    $("seed").value = Math.floor(Math.random() * 1e6);
  }

  setMode(mode) {
    const editing = mode === "edit";
    $("class-title").textContent = editing ? "What to put there" : "What to generate";
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
    query.set("seed", settings.seed);
    if (settings.count !== 1) query.set("count", settings.count);
    for (const name of this.sampling.names) {
      if (settings[name] != null) query.set(name, settings[name]);
    }
    return `?${query}`;
  }

  /**
   * {settings, unclear} of an address, or null where it says nothing. `settings.seed` may be null;
   * `unclear` are the labels that do not name one class, each {label, numbers}.
   */
  parse(text) {
    const query = new URLSearchParams(text);
    const number = (name) => (query.has(name) ? Number(query.get(name)) : null);
    if (!query.has("seed") && !query.has("label")) return null;
    const seed = Number.isSafeInteger(number("seed")) && number("seed") >= 0 ? number("seed") : null;
    const labels = query.getAll("label").map((label) => ({ label, numbers: this.#named(label) }));
    const unclear = labels.filter(({ numbers }) => numbers.length !== 1);
    const { limits } = this.model;
    const clear = labels.filter(({ numbers }) => numbers.length === 1);
    const known = [...new Set(clear.map(({ numbers }) => numbers[0]))];
    const settings = { seed, labels: known.slice(0, limits.count) };
    if (!settings.labels.length) settings.labels = [null];
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

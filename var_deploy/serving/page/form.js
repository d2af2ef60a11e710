/** Class, seed, count and sliders; and the same as the query of an address. */

const SLIDERS = [
  ["cfg", "Guidance", 0, 10, 0.1, "How closely the class is followed; 0 is off."],
  ["temperature", "Temperature", 0.1, 2, 0.05, "Low is careful, high is wild."],
  ["top_k", "Top-k", 0, 1000, 1, "Draws from the k likeliest codes; 0 keeps all."],
  ["top_p", "Top-p", 0, 1, 0.01, "Draws from the likeliest codes up to this share; 0 keeps all."],
];
const FEW = 24; // classes that are shown all at once
const NONE = { draw: "no class", edit: "whatever fits" };

const $ = (id) => document.getElementById(id);

export class Form {
  constructor(model) {
    this.model = model;
    this.names = model.labels ?? [];
    this.sliders = new Map();
    $("class-box").hidden = !model.conditional;
    this.chips = model.conditional && this.names.length > 0 && this.names.length <= FEW;
    if (this.chips) this.#makeChips();
    else this.#makeSearch();
    const offered = model.guidance && model.conditional ? SLIDERS : SLIDERS.slice(1);
    for (const slider of offered) this.#makeSlider(...slider);
    $("count").max = model.limits.count;
    this.reset();
    this.setMode("draw");
  }

  /** What is asked for: `label` null is no class, a setting null is the model's default. */
  read() {
    const settings = { label: this.#label(), seed: $("seed").valueAsNumber };
    settings.count = $("count").valueAsNumber;
    for (const [name, { number }] of this.sliders) {
      const chosen = number.value === "" ? null : number.valueAsNumber;
      settings[name] = chosen === this.model.defaults[name] ? null : chosen;
    }
    return settings;
  }

  write(settings) {
    this.#setLabel(settings.label);
    $("seed").value = settings.seed;
    $("count").value = settings.count;
    for (const name of this.sliders.keys()) this.#set(name, settings[name] ?? null);
  }

  reset() {
    for (const name of this.sliders.keys()) this.#set(name, null);
  }

  newSeed() {
    $("seed").value = Math.floor(Math.random() * 1e6);
  }

  newLabel() {
    const n = Math.floor(Math.random() * this.model.classes);
    this.#setLabel(this.names[n] ?? n);
  }

  setMode(mode) {
    $("class-title").textContent = mode === "edit" ? "What to put there" : "What to draw";
    $("class-text").placeholder = `a name or a number; empty: ${NONE[mode]}`;
    const none = $("chips").querySelector("[data-none]");
    if (!none) return;
    none.nextElementSibling.textContent = NONE[mode];
    if (mode === "edit" && !this.chosen) none.checked = true;
  }

  /** The query of an address that shows the same again. */
  query(settings) {
    const query = new URLSearchParams();
    if (settings.label !== null) query.set("label", settings.label);
    query.set("seed", settings.seed);
    if (settings.count !== 1) query.set("count", settings.count);
    for (const name of this.sliders.keys()) {
      if (settings[name] !== null) query.set(name, settings[name]);
    }
    return `?${query}`;
  }

  /** Settings of an address, or null where it names none. */
  parse(text) {
    const query = new URLSearchParams(text);
    const number = (name) => (query.has(name) ? Number(query.get(name)) : null);
    if (!Number.isSafeInteger(number("seed")) || number("seed") < 0) return null;
    const settings = { label: query.get("label"), seed: number("seed") };
    const count = Number.isInteger(number("count")) ? number("count") : 1;
    settings.count = Math.min(Math.max(count, 1), this.model.limits.count);
    for (const name of this.sliders.keys()) {
      settings[name] = Number.isFinite(number(name)) ? number(name) : null;
    }
    return settings;
  }

  #label() {
    if (!this.model.conditional) return null;
    if (!this.chips) return $("class-text").value.trim() || null;
    const value = $("chips").querySelector(":checked")?.value ?? "";
    return value === "" ? null : this.names[value];
  }

  #setLabel(label) {
    if (!this.chips) $("class-text").value = label ?? "";
    else {
      const fold = (name) => String(name).toLowerCase();
      const known = this.names.findIndex((name) => fold(name) === fold(label));
      const n = label === null ? "" : known >= 0 ? known : label;
      const chip = $("chips").querySelector(`[value="${CSS.escape(n)}"]`);
      if (chip) chip.checked = true;
    }
  }

  #makeChips() {
    const chip = (value, text) => {
      const label = document.createElement("label");
      const radio = Object.assign(document.createElement("input"), {
        type: "radio",
        name: "class",
        value,
      });
      radio.addEventListener("change", () => (this.chosen = true));
      label.append(radio, Object.assign(document.createElement("span"), { textContent: text }));
      $("chips").append(label);
      return radio;
    };
    this.names.forEach((name, n) => chip(n, name));
    $("chips").querySelector("input").checked = true;
    chip("", NONE.draw).dataset.none = "";
  }

  #makeSearch() {
    $("chips").hidden = true;
    $("class-search").hidden = false;
    $("class-names").append(...this.names.map((name) => new Option(name, name)));
    $("class-hint").hidden = this.names.length > 0;
    $("class-hint").textContent = `Classes are the numbers 0 to ${this.model.classes - 1}.`;
    $("any-class").addEventListener("click", () => this.newLabel());
  }

  #makeSlider(name, title, min, max, step, hint) {
    const row = document.createElement("div");
    row.className = "slider";
    row.innerHTML = `<label for="${name}">${title}</label>
      <input type="range" id="${name}" min="${min}" max="${max}" step="${step}"
        aria-describedby="${name}-hint">
      <input type="number" id="${name}-number" min="0" step="any" aria-label="${title}, a number"
        placeholder="varies"><p class="hint" id="${name}-hint">${hint}</p>`;
    $("sliders").append(row);
    const [range, number] = row.querySelectorAll("input");
    if (name === "top_k") number.step = 1;
    range.addEventListener("input", () => (number.value = range.valueAsNumber));
    number.addEventListener("input", () => {
      if (number.value !== "") range.value = number.value;
    });
    this.sliders.set(name, { range, number });
  }

  /** null is the default, which may be one value a scale: no number says that. */
  #set(name, value) {
    const { range, number } = this.sliders.get(name);
    const shown = value ?? this.model.defaults[name];
    number.value = Array.isArray(shown) ? "" : shown;
    range.value = Array.isArray(shown) ? shown.at(-1) : shown;
  }
}

/** The sampling settings, each as a slider with a field for the exact number. */

const $ = (id) => document.getElementById(id);

/** [name, title, least, most, step, hint]; where `filter`, the right end keeps all codes. */
function sliders(model) {
  const codes = model.codes;
  const words = model.takes === "prompts";
  const guidance = words
    ? "How closely the prompt is followed; 1 is off."
    : "How closely the class is followed; 0 is off.";
  const topP = words
    ? "A bit's unlikelier value is dropped up to 1 minus this; “all” is on the right."
    : "Only the likeliest codes that make up this share; “all” is on the right.";
  const off = words ? 1 : 0;
  const all = [
    { name: "cfg", title: "Guidance", least: off, most: 10, step: 0.1, hint: guidance },
    {
      name: "temperature",
      title: "Temperature",
      least: 0.1,
      most: 2,
      step: 0.05,
      hint: "Low is careful, high is wild.",
    },
    {
      name: "top_k",
      title: "Top-k",
      least: 1,
      most: codes,
      step: 1,
      filter: true,
      hint: `Only the k likeliest of ${codes} codes; “all” is on the right.`,
    },
    { name: "top_p", title: "Top-p", least: 0.01, most: 1, step: 0.01, filter: true, hint: topP },
  ];
  const useless = [
    ...(model.guidance && model.takes !== "nothing" ? [] : ["cfg"]),
    ...(words ? ["top_k"] : []), // a bit has two values
  ];
  return all.filter(({ name }) => !useless.includes(name));
}

/**
 * Values as the service takes them: numbers, 0 where a filter keeps all, and null for the model's
 * default, which may be one value for each scale.
 */
export class SamplingSliders {
  constructor(model) {
    this.defaults = model.defaults;
    this.rows = new Map(sliders(model).map((slider) => [slider.name, this.#make(slider)]));
    this.write({});
  }

  get names() {
    return [...this.rows.keys()];
  }

  read() {
    return Object.fromEntries(
      [...this.rows].map(([name, row]) => [name, row.number.value === "" ? null : row.value()]),
    );
  }

  /** What differs from the model's defaults, as "Top-k 50". */
  describe(values) {
    return [...this.rows]
      .filter(([name]) => values[name] != null)
      .map(([name, row]) => `${row.title} ${row.text(values[name])}`);
  }

  write(values) {
    for (const [name, row] of this.rows) row.show(values[name] ?? null);
  }

  #make({ name, title, least, most, step, filter = false, hint }) {
    const element = document.createElement("div");
    element.className = "slider";
    const field = filter
      ? 'type="text" inputmode="decimal" spellcheck="false"'
      : 'type="number" min="0" step="any"';
    element.innerHTML = `<label for="${name}">${title}</label>
      <input type="range" id="${name}" min="${least}" max="${most}" step="${step}"
        aria-describedby="${name}-hint">
      <input ${field} id="${name}-number" aria-label="${title}, exactly">
      <p class="hint" id="${name}-hint">${hint}</p>`;
    $("sliders").append(element);
    const [range, number] = element.querySelectorAll("input");
    const byDefault = this.defaults[name];
    const byScale = Array.isArray(byDefault);
    if (byScale) number.placeholder = "by scale";
    const keepsAll = (value) => filter && (value === 0 || value >= most);
    const text = (value) => (keepsAll(value) ? "all" : String(value));
    const typed = () => (number.value.trim().toLowerCase() === "all" ? 0 : Number(number.value));

    const move = (value) => {
      range.value = keepsAll(value) ? most : value;
      range.setAttribute("aria-valuetext", number.value === "" ? number.placeholder : text(value));
    };
    const show = (value) => {
      const shown = value ?? byDefault;
      number.value = Array.isArray(shown) ? "" : text(shown);
      number.setCustomValidity("");
      move(Array.isArray(shown) ? shown.at(-1) : shown);
    };
    const value = () => {
      const chosen = keepsAll(typed()) ? 0 : typed();
      const same = byDefault === chosen || (keepsAll(byDefault) && chosen === 0);
      return !byScale && same ? null : chosen;
    };
    range.addEventListener("input", () => {
      number.value = text(range.valueAsNumber);
      number.setCustomValidity("");
      range.setAttribute("aria-valuetext", number.value);
    });
    number.addEventListener("input", () => {
      const found = typed();
      const wrong = filter && !(found >= 0 && (step < 1 || Number.isInteger(found)));
      const whole = step < 1 ? "number" : "whole number";
      number.setCustomValidity(wrong ? `A ${whole} up to ${most}, or “all”.` : "");
      if (number.value === "") move(byScale ? byDefault.at(-1) : byDefault);
      else if (Number.isFinite(found)) move(found);
    });
    number.addEventListener("blur", () => {
      if (number.value === "" && !byScale) show(null);
    });
    return { title, number, text, show, value };
  }
}

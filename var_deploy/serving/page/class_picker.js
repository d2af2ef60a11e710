/**
 * Choosing classes: chips where there are few, a searchable list where there are many.
 *
 * The list is a combobox with a listbox, as the ARIA Authoring Practices describe them: the focus
 * stays in the text, and `aria-activedescendant` names the option that Enter takes.
 */

const FEW = 24; // classes that are shown all at once
const MOST = 1200; // options that are made at a time
const PAGE = 8; // options that PageUp and PageDown pass over

const $ = (id) => document.getElementById(id);

export class ClassPicker {
  /**
   * `onChange` is called when other classes are chosen, `onRefuse` with a sentence when one more
   * than `limit` would be.
   */
  constructor(classes, limit, { onChange, onRefuse }) {
    this.classes = classes;
    this.limit = limit;
    this.onChange = onChange;
    this.onRefuse = onRefuse;
    this.noneText = "no class";
    this.chosen = [0]; // numbers, null for "no class"; never empty
    this.several = false; // whether more than one may be chosen
    this.few = classes.names.length > 0 && classes.count <= FEW;
    $("chips").hidden = !this.few;
    $("class-search").hidden = this.few;
    if (this.few) this.#makeChips();
    else this.#makeSearch();
  }

  set(chosen, { several = this.several, noneText = this.noneText } = {}) {
    Object.assign(this, { several: several || chosen.length > 1, noneText });
    this.#choose(chosen);
  }

  setSeveral(several) {
    this.several = several;
    this.#choose(several ? this.chosen : this.chosen.slice(0, 1));
  }

  random() {
    const number = Math.floor(Math.random() * this.classes.count);
    if (!this.several) this.#choose([number]);
    else if (!this.chosen.includes(number)) this.#toggle(number);
  }

  /** Text that was typed and not taken, "" where there is none. */
  get pending() {
    return this.few ? "" : $("class-text").value.trim();
  }

  #choose(chosen) {
    this.chosen = chosen.length ? chosen : [null];
    this.#show();
    this.onChange(this.chosen);
  }

  #toggle(number) {
    const { chosen } = this;
    if (!this.several) this.#choose([number]);
    else if (chosen.includes(number)) this.#choose(chosen.filter((other) => other !== number));
    else if (chosen.length < this.limit) this.#choose([...chosen, number]);
    else {
      this.#show(); // a chip that the browser has checked already
      this.onRefuse(`The service makes ${this.limit} pictures at once, so no more classes fit.`);
    }
  }

  #show() {
    if (this.few) this.#showChips();
    else this.#showChosen();
  }

  // chips

  #makeChips() {
    const numbers = [...this.classes.entries.map(({ number }) => number), null];
    for (const number of numbers) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      Object.assign(input, { type: "radio", name: "class", value: number ?? "" });
      input.addEventListener("change", () => this.#toggle(number));
      label.append(input, document.createElement("span"));
      $("chips").append(label);
    }
    this.#showChips();
  }

  #showChips() {
    $("chips").setAttribute("role", this.several ? "group" : "radiogroup");
    const inputs = [...$("chips").querySelectorAll("input")];
    for (const input of inputs) input.checked = false; // a checked one becomes the only radio
    for (const input of inputs) {
      const number = input.value === "" ? null : Number(input.value);
      input.type = this.several ? "checkbox" : "radio";
      input.checked = this.chosen.includes(number);
      input.nextElementSibling.textContent = this.classes.nameOf(number) ?? this.noneText;
    }
  }

  // the list

  #makeSearch() {
    const text = $("class-text");
    text.placeholder = this.classes.names.length
      ? `Search ${this.classes.count} classes`
      : `A number from 0 to ${this.classes.count - 1}`;
    text.addEventListener("input", () => this.#open());
    text.addEventListener("click", () => this.#open());
    text.addEventListener("keydown", (event) => this.#key(event));
    text.addEventListener("blur", () => this.#leave());
    $("class-popup").addEventListener("pointerdown", (event) => event.preventDefault());
    $("class-list").addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.#take(option);
    });
    $("any-class").addEventListener("click", () => this.random());
    this.#showChosen();
  }

  get #isOpen() {
    return !$("class-popup").hidden;
  }

  get #options() {
    return [...$("class-list").children];
  }

  /** Make the options anew, and show them. */
  #open() {
    const text = $("class-text").value;
    const found = this.classes.search(text);
    const folded = text.trim().toLowerCase();
    const offersNone = !folded || this.noneText.includes(folded) || folded === "none";
    const shown = found.slice(0, MOST);
    const options = shown.map((entry) => this.#option(entry));
    if (offersNone) options.unshift(this.#option({ number: null, name: this.noneText, shown: [] }));
    $("class-list").replaceChildren(...options);
    $("class-list").hidden = options.length === 0;
    const more = found.length > shown.length ? `, the first ${shown.length} are shown` : "";
    const count = `${found.length} ${found.length === 1 ? "class" : "classes"}${more}`;
    $("class-found").textContent = options.length ? count : "No class is called that.";
    $("class-popup").hidden = false;
    $("class-text").setAttribute("aria-expanded", "true");
    const frame = $("class-text").getBoundingClientRect();
    const below = innerHeight - frame.bottom;
    $("class-popup").classList.toggle("above", below < 280 && frame.top > below);
    this.#activate(folded ? (options[0] ?? null) : null);
    if (!folded) this.#reveal(options.find((option) => option.ariaSelected === "true"));
  }

  #option({ number, name, shown }) {
    const option = document.createElement("li");
    const [title, note, also] = ["span", "small", "small"].map((tag) =>
      document.createElement(tag),
    );
    option.id = `class-option-${number ?? "none"}`;
    option.setAttribute("role", "option");
    option.ariaSelected = String(this.chosen.includes(number));
    title.textContent = name;
    also.textContent = shown.join(", ");
    note.textContent = number ?? "";
    note.className = "number";
    option.append(note, title, ...(shown.length ? [also] : []));
    return option;
  }

  #close() {
    $("class-popup").hidden = true;
    $("class-text").setAttribute("aria-expanded", "false");
    this.#activate(null);
  }

  /** Mark the option that Enter takes. */
  #activate(option) {
    this.active?.classList.remove("active");
    this.active = option;
    option?.classList.add("active");
    if (option) $("class-text").setAttribute("aria-activedescendant", option.id);
    else $("class-text").removeAttribute("aria-activedescendant");
    this.#reveal(option);
  }

  #reveal(option) {
    if (!option) return;
    const list = $("class-list");
    const none = $("class-option-none")?.offsetHeight ?? 0; // which stays at the top
    const [top, bottom] = [option.offsetTop - none, option.offsetTop + option.offsetHeight];
    if (top < list.scrollTop) list.scrollTop = top;
    if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
  }

  #take(option) {
    const id = option.id.replace("class-option-", "");
    this.#toggle(id === "none" ? null : Number(id));
    $("class-text").value = "";
    if (this.several) this.#open();
    else this.#close();
  }

  #key(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: PAGE, PageUp: -PAGE };
    const { key } = event;
    if (key in steps && event.altKey) {
      if (steps[key] > 0) this.#open();
      else this.#close();
    } else if (key in steps) {
      const wasOpen = this.#isOpen;
      if (!wasOpen) this.#open();
      this.#step(steps[key]);
    } else if (this.#isOpen && this.active && (key === "Home" || key === "End")) {
      this.#activate(this.#options.at(key === "Home" ? 0 : -1));
    } else if (key === "Enter" && this.#isOpen && this.active) this.#take(this.active);
    else if (key === "Enter" && $("class-text").value.trim()) this.#open(); // nothing is sent yet
    else if (key === "Escape" && this.#isOpen) this.#close();
    else if (key === "Escape") $("class-text").value = "";
    else if (key === "Backspace" && !$("class-text").value && this.several) {
      if (this.chosen.length > 1) this.#choose(this.chosen.slice(0, -1));
      return;
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #step(by) {
    const options = this.#options;
    if (!options.length) return;
    const chosen = options.findIndex((option) => option.ariaSelected === "true");
    if (!this.active) {
      this.#activate(options[chosen >= 0 ? chosen : by > 0 ? 0 : options.length - 1]);
      return;
    }
    const at = options.indexOf(this.active);
    const wanted = at + by;
    const whole = Math.abs(by) === 1; // single steps go round
    const last = options.length - 1;
    const clamped = Math.min(Math.max(wanted, 0), last);
    this.#activate(options[whole ? (wanted + options.length) % options.length : clamped]);
  }

  /** What is typed in full counts as chosen. */
  #leave() {
    this.#close();
    const numbers = this.pending ? this.classes.named(this.pending) : [];
    if (numbers.length !== 1) return;
    const [number] = numbers;
    $("class-text").value = "";
    if (!this.chosen.includes(number)) this.#toggle(number);
  }

  /** The chosen classes above the text. */
  #showChosen() {
    const items = this.chosen.map((number) => {
      const item = document.createElement("li");
      const name = this.classes.nameOf(number) ?? this.noneText;
      item.append(Object.assign(document.createElement("span"), { textContent: name }));
      if (number !== null && this.classes.names.length) {
        item.append(Object.assign(document.createElement("small"), { textContent: number }));
      }
      if (this.chosen.length > 1) {
        const remove = document.createElement("button");
        Object.assign(remove, { type: "button", textContent: "×", title: "Remove" });
        remove.setAttribute("aria-label", `Remove ${name}`);
        remove.addEventListener("click", () => {
          this.#toggle(number);
          $("class-text").focus();
          this.#close();
        });
        item.append(remove);
      }
      return item;
    });
    $("chosen").replaceChildren(...items);
    for (const option of this.#options) {
      const id = option.id.replace("class-option-", "");
      option.ariaSelected = String(this.chosen.includes(id === "none" ? null : Number(id)));
    }
  }
}

/** The pictures in the middle, and what they were after each scale. */

import { nameOf } from "./gallery.js";

const $ = (id) => document.getElementById(id);
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
const MOST_CELLS = 32; // along a side of an empty thumbnail: more lines would fill it
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

/** Where every picture of `set` is finished. */
export const finished = (set) => set.pictures.every((picture) => picture.png);

export class Viewer {
  /** `onChange` is called whenever another picture, or another set of them, is looked at. */
  constructor(model, onChange) {
    this.model = model;
    this.onChange = onChange;
    this.set = null; // {kind, pictures: [{scales, png, label, seed, …}]}
    this.solo = null; // the one picture that is looked at, of several
    this.scale = null; // looked at, null for the finished picture
    this.played = 0;
    const small = Math.max(model.width, model.height) < 256;
    document.body.style.setProperty("--ratio", model.width / model.height);
    const fit = () => {
      // a pixel of a small picture covers whole pixels of the screen
      const step = small ? model.width / devicePixelRatio : 1;
      $("viewer").style.setProperty("--step", `${step}px`);
    };
    fit();
    addEventListener("resize", fit);
    $("viewer").classList.toggle("pixels", small);
    this.#makeStrip();
    this.#makePattern();
  }

  /** The picture that the actions are about; null while several are shown, or none. */
  get current() {
    if (!this.set) return null;
    return this.set.pictures[this.set.pictures.length === 1 ? 0 : (this.solo ?? -1)] ?? null;
  }

  show(set, solo = null) {
    this.set = set;
    this.solo = solo;
    this.scale = null;
    const tiles = (set?.pictures ?? []).map((picture, n) => this.#makeTile(picture, n));
    $("tiles").replaceChildren(...tiles);
    this.#refresh();
  }

  /** One picture of several, or null for all of them. */
  look(solo) {
    this.solo = solo;
    this.#refresh();
  }

  /** Mark the scale that is being generated; null for none. */
  markScale(scale) {
    [...$("strip").children].forEach((button, k) =>
      button.classList.toggle("current", k === scale),
    );
  }

  lookAtScale(scale) {
    this.scale = scale;
    this.#refresh();
  }

  /**
   * Show event after event, each for long enough to be seen, though the model may be quicker.
   * `onShown` is called with the scale that is shown.
   */
  async play(queue, signal, onShown) {
    const { scales } = this.model;
    const gap = reducedMotion.matches ? 0 : Math.min(260, Math.max(90, 1400 / scales));
    for await (const event of queue) {
      if (signal.aborted) return;
      for (const { number, png } of event.images) {
        this.set.pictures[number].scales[event.scale] = `data:image/png;base64,${png}`;
        this.#paint(number, true);
      }
      this.#refreshStrip(event.scale);
      onShown(event.scale);
      await pause(queue.length > scales ? gap / 3 : gap);
    }
  }

  async replay() {
    const number = (this.played += 1);
    const { set } = this;
    for (let scale = 0; scale < this.model.scales; scale++) {
      this.scale = scale;
      this.#refresh(true);
      await pause(reducedMotion.matches ? 700 : 350);
      if (number !== this.played || set !== this.set || this.scale !== scale) return;
    }
    this.lookAtScale(null);
  }

  #refresh(fading = false) {
    const { set, solo } = this;
    const several = set !== null && set.pictures.length > 1 && solo === null;
    const columns = several ? Math.ceil(Math.sqrt(set.pictures.length)) : 1;
    $("viewer").style.setProperty("--columns", columns);
    [...$("tiles").children].forEach((tile, n) => {
      tile.hidden = solo !== null && n !== solo;
      tile.disabled = set.pictures.length === 1 || !finished(set);
      this.#paint(n, fading);
    });
    this.#refreshStrip(this.scale);
    this.onChange();
  }

  #paint(n, fading) {
    const picture = this.set.pictures[n];
    const tile = $("tiles").children[n];
    const latest = picture.png ?? picture.scales.at(-1);
    const source = (this.scale === null ? latest : picture.scales[this.scale]) ?? latest;
    const image = tile.querySelector("img:not(.former)");
    if (!source || image.getAttribute("src") === source) return;
    if (fading && !reducedMotion.matches && image.hasAttribute("src")) {
      tile.querySelector(".former")?.remove();
      const former = image.cloneNode();
      former.className = "former";
      former.alt = "";
      former.addEventListener("animationend", () => former.remove());
      tile.append(former);
    }
    image.src = source;
  }

  #makeTile(picture, n) {
    const tile = document.createElement("button");
    tile.type = "button";
    tile.className = "tile";
    const image = document.createElement("img");
    image.alt = "";
    tile.ariaLabel = nameOf(picture); // before there is an image, too
    tile.append(image);
    tile.addEventListener("click", () => this.look(this.solo === null ? n : null));
    return tile;
  }

  #makeStrip() {
    const { grids, scales } = this.model;
    $("strip").style.setProperty("--scales", scales);
    const square = grids.every(([rows, columns]) => rows === columns);
    grids.forEach(([rows, columns], scale) => {
      const button = document.createElement("button");
      button.type = "button";
      button.disabled = true;
      const shrink = Math.max(1, Math.max(rows, columns) / MOST_CELLS);
      button.style.setProperty("--rows", rows / shrink);
      button.style.setProperty("--cells", columns / shrink);
      // on a phone they stand close
      const short = scales <= 7 ? `${columns}×${rows}` : square ? rows : "";
      button.innerHTML = `<span class="thumb"><img alt="" hidden></span><small>${short}</small>`;
      button.setAttribute("aria-label", `Scale ${scale + 1} of ${scales}, ${columns} by ${rows}`);
      button.addEventListener("click", () => {
        this.played += 1;
        const last = scale === scales - 1;
        this.lookAtScale(this.scale === scale || last ? null : scale);
      });
      $("strip").append(button);
    });
  }

  /** Thumbnails of the one picture, or of the one being generated of several. */
  #refreshStrip(at) {
    const pictures = this.set?.pictures ?? [];
    const unfinished = pictures.filter((picture) => !picture.png && picture.scales.length);
    const picture = this.current ?? unfinished.at(-1) ?? pictures[0];
    const last = this.model.scales - 1;
    [...$("strip").children].forEach((button, scale) => {
      const image = button.querySelector("img");
      const source = picture?.scales[scale];
      image.hidden = !source;
      if (source) image.src = source;
      button.disabled = !source || !finished(this.set);
      const shown = at ?? (picture?.png ? last : null);
      button.setAttribute("aria-pressed", String(Boolean(source) && scale === shown));
    });
  }

  /** Cells of every scale above each other, before there is a picture. */
  #makePattern() {
    const grids = this.model.grids.slice(0, 5);
    let state = 20;
    const random = () => (state = (state * 16807) % 2147483647) / 2147483647;
    random();
    const cells = grids.flatMap(([rows, columns]) =>
      Array.from({ length: rows * columns }, (_, n) => {
        const [x, y] = [(n % columns) / columns, Math.floor(n / columns) / rows];
        const hue = 40 - 75 * (x + y) + 30 * random(); // warm to cool along the diagonal
        return `<rect x="${x}" y="${y}" width="${1 / columns}" height="${1 / rows}"
          fill="hsl(${hue} 50% 62%)" opacity="${(0.03 + 0.18 * random()).toFixed(2)}"/>`;
      }),
    );
    $("pattern").setAttribute("viewBox", "0 0 1 1");
    $("pattern").innerHTML = cells.join("");
  }
}

/** A queue between one who adds and one who waits: `for await` ends once it is closed. */
export class EventQueue {
  #waiting = [];
  #wake = () => {};
  #closed = false;

  get length() {
    return this.#waiting.length;
  }

  add(item) {
    this.#waiting.push(item);
    this.#wake();
  }

  close() {
    this.#closed = true;
    this.#wake();
  }

  async *[Symbol.asyncIterator]() {
    for (;;) {
      while (this.#waiting.length) yield this.#waiting.shift();
      if (this.#closed) return;
      await new Promise((wake) => (this.#wake = wake));
    }
  }
}

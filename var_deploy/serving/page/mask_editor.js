/** A mask of width × height pixels that is painted over a picture. */

const REMEMBERED = 40; // steps that can be undone

export class MaskEditor {
  /**
   * `onChange` is called with this editor whenever the mask has changed.
   *
   * @param canvas what is painted on
   * @param cursor an element that shows the brush
   */
  constructor(canvas, cursor, onChange) {
    this.canvas = canvas;
    this.cursor = cursor;
    this.onChange = onChange;
    this.tool = "brush";
    this.size = 10;
    this.resize(1, 1);
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", () => this.#up());
    canvas.addEventListener("pointercancel", () => this.#up());
    canvas.addEventListener("pointerleave", () => this.#hideCursor());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#hideCursor());
  }

  /** A new, empty mask. */
  resize(width, height) {
    this.width = this.canvas.width = width;
    this.height = this.canvas.height = height;
    this.marks = new Uint8Array(width * height);
    this.undone = []; // masks that redo brings back, the next one last
    this.past = [];
    this.at = { x: width / 2, y: height / 2 };
    this.corner = this.from = null;
    this.#paint();
  }

  /** The marked share of the picture, 0 … 1. */
  get share() {
    return this.marks.reduce((sum, mark) => sum + mark, 0) / this.marks.length;
  }

  get canUndo() {
    return this.past.length > 0;
  }

  get canRedo() {
    return this.undone.length > 0;
  }

  invert() {
    this.#remember();
    this.marks = this.marks.map((mark) => 1 - mark);
    this.#paint();
  }

  clear() {
    this.#remember();
    this.marks.fill(0);
    this.#paint();
  }

  undo() {
    this.#travel(this.past, this.undone);
  }

  redo() {
    this.#travel(this.undone, this.past);
  }

  /** Mark one of the regions that the page offers by name. */
  region(name) {
    const { width, height } = this;
    const [centre, middle] = [Math.round(width / 2), Math.round(height / 2)];
    const boxes = {
      left: [0, 0, centre, height],
      right: [centre, 0, width, height],
      top: [0, 0, width, middle],
      bottom: [0, middle, width, height],
      all: [0, 0, width, height],
    };
    this.#remember();
    const border = name === "border";
    this.marks.fill(border ? 1 : 0);
    const [across, down] = [Math.round(width / 4), Math.round(height / 4)];
    const inner = [across, down, width - across, height - down];
    this.#box(boxes[name] ?? inner, border ? 0 : 1);
    this.#paint();
  }

  /** A PNG as a data: URL, white where the picture is to be new. */
  toDataURL() {
    const canvas = document.createElement("canvas");
    canvas.width = this.width;
    canvas.height = this.height;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(this.width, this.height);
    const words = new Uint32Array(pixels.data.buffer);
    this.marks.forEach((mark, n) => (words[n] = mark ? 0xffffffff : 0xff000000));
    context.putImageData(pixels, 0, 0);
    return canvas.toDataURL("image/png");
  }

  #down(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.at = this.#place(event);
    this.#begin();
  }

  #move(event) {
    const at = this.#place(event);
    if (this.from) this.#drag(at);
    this.at = at;
    this.#showCursor();
  }

  #up() {
    this.from = null;
    this.corner = null;
  }

  #key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const { width, height } = this;
    if (steps[event.key]) {
      const short = Math.min(width, height);
      const length = Math.max(1, event.shiftKey ? short / 8 : short / 64);
      const [x, y] = steps[event.key].map((step) => step * length);
      const clamp = (value, end) => Math.min(end - 0.5, Math.max(0.5, value));
      const at = { x: clamp(this.at.x + x, width), y: clamp(this.at.y + y, height) };
      if (this.corner) this.#drag(at);
      this.at = at;
    } else if (event.key === " " || event.key === "Enter") {
      if (event.repeat) return event.preventDefault();
      if (this.corner) this.#up();
      else {
        this.#begin();
        this.from = null;
        if (this.tool !== "box") this.#up();
      }
    } else return;
    event.preventDefault();
    this.#showCursor();
  }

  /** The first dot of a stroke, or the first corner of a box. */
  #begin() {
    this.#remember();
    this.from = this.at;
    this.corner = this.tool === "box" ? this.at : null;
    this.base = this.marks.slice();
    this.#drag(this.at);
  }

  #drag(to) {
    if (this.corner) {
      this.marks.set(this.base);
      const [x0, x1] = [this.corner.x, to.x].sort((a, b) => a - b);
      const [y0, y1] = [this.corner.y, to.y].sort((a, b) => a - b);
      this.#box([Math.floor(x0), Math.floor(y0), Math.floor(x1) + 1, Math.floor(y1) + 1], 1);
    } else this.#stroke(this.at, to, this.tool === "erase" ? 0 : 1);
    this.#paint();
  }

  #box([x0, y0, x1, y1], mark) {
    const { width, height } = this;
    const [left, right] = [Math.min(width, Math.max(0, x0)), Math.max(0, Math.min(width, x1))];
    for (let y = Math.max(0, y0); y < Math.min(height, y1); y++) {
      this.marks.fill(mark, y * width + left, y * width + right);
    }
  }

  /** Round dots along a line; a pixel belongs to a dot where its middle does. */
  #stroke(from, to, mark) {
    const radius = this.size / 2;
    const steps = Math.max(1, Math.ceil(Math.hypot(to.x - from.x, to.y - from.y)));
    for (let step = 0; step <= steps; step++) {
      const x = from.x + ((to.x - from.x) * step) / steps;
      const y = from.y + ((to.y - from.y) * step) / steps;
      // a brush of one pixel marks the one that it is on
      this.#box([Math.floor(x), Math.floor(y), Math.floor(x) + 1, Math.floor(y) + 1], mark);
      const top = Math.max(0, Math.floor(y - radius));
      for (let row = top; row <= Math.min(this.height - 1, y + radius); row++) {
        const reach = Math.sqrt(Math.max(0, radius ** 2 - (row + 0.5 - y) ** 2));
        this.#box([Math.round(x - reach), row, Math.round(x + reach), row + 1], mark);
      }
    }
  }

  #travel(from, to) {
    if (!from.length) return;
    to.push(this.marks);
    this.marks = from.pop();
    this.corner = this.from = null;
    this.#paint();
  }

  #remember() {
    this.undone.length = 0;
    this.past.push(this.marks.slice());
    if (this.past.length > REMEMBERED) this.past.shift();
  }

  #paint() {
    const context = this.canvas.getContext("2d");
    const pixels = context.createImageData(this.width, this.height);
    const words = new Uint32Array(pixels.data.buffer);
    this.marks.forEach((mark, n) => (words[n] = mark ? 0xffffffff : 0));
    context.putImageData(pixels, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = getComputedStyle(this.canvas).getPropertyValue("--mask");
    context.fillRect(0, 0, this.width, this.height);
    context.globalCompositeOperation = "source-over";
    this.onChange(this);
  }

  #place(event) {
    const frame = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - frame.left) / frame.width) * this.width,
      y: ((event.clientY - frame.top) / frame.height) * this.height,
    };
  }

  #showCursor() {
    const diameter = this.tool === "box" ? 1 : this.size;
    Object.assign(this.cursor.style, {
      left: `${(100 * this.at.x) / this.width}%`,
      top: `${(100 * this.at.y) / this.height}%`,
      width: `${(100 * diameter) / this.width}%`,
    });
    this.cursor.hidden = false;
  }

  #hideCursor() {
    this.cursor.hidden = true;
    if (!this.from) this.corner = null; // a box begun with the keyboard
  }
}

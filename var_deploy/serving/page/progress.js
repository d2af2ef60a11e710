/** How far a request is: the scale that is being generated, elapsed and expected time. */

const SHOWN_FROM = 1.5; // seconds; what is quicker needs no clock

/** What has happened to a request so far, and text about it. */
export class Progress {
  #model;
  #count;
  #weights; // of the scales, 1 in all
  #from; // when it was sent, then when its turn came, as performance.now() counts
  #turn = false; // whether it is this request's turn
  #position = 0;
  #stated = null; // seconds, as the service expects
  #share = 0; // of the work that is done, and when that was heard
  #heard = 0;
  #first = 0; // number of the first picture that is being generated
  scale = null; // that is being generated

  constructor(model, count) {
    this.#model = model;
    this.#count = count;
    this.#from = performance.now();
    // half of a scale's time goes with its tokens, half with the preview that it is shown with
    const tokens = model.grids.map(([rows, columns]) => rows * columns);
    const all = tokens.reduce((sum, n) => sum + n, 0);
    this.#weights = tokens.map((n) => 0.5 * (n / all) + 0.5 / model.scales);
  }

  get elapsed() {
    return (performance.now() - this.#from) / 1000;
  }

  queued({ position, seconds }) {
    this.#position = position;
    this.#stated = seconds ?? null;
    this.#turn = position === 0;
    if (this.#turn) this.#from = performance.now(); // so far it has waited
    this.scale = this.#turn ? 0 : null;
  }

  scaleDone({ scale, images }) {
    const { batch, scales } = this.#model;
    this.#turn = true;
    const first = images[0].number;
    const batches = Math.ceil(this.#count / batch);
    const done = this.#weights.slice(0, scale + 1).reduce((sum, weight) => sum + weight, 0);
    this.#share = Math.min(1, (first / batch + done) / batches);
    this.#heard = this.elapsed;
    const last = scale === scales - 1;
    this.scale = last ? 0 : scale + 1;
    this.#first = Math.min(last ? first + batch : first, this.#count - 1);
  }

  /** Seconds that the request will have taken, null where that is not known yet. */
  get expected() {
    if (this.#share === 0) return this.#stated;
    const measured = this.#heard / this.#share;
    const trust = this.#stated === null ? 1 : this.#share;
    return trust * measured + (1 - trust) * (this.#stated ?? 0);
  }

  /** 0 … 1, null where that is not known yet. */
  get fraction() {
    const { elapsed, expected } = this;
    return this.#turn && expected ? Math.min(0.99, elapsed / Math.max(expected, elapsed)) : null;
  }

  /** One line. */
  get text() {
    return [this.#what(), this.#which(), this.#time()].filter(Boolean).join(" · ");
  }

  #what() {
    const { scales, grids } = this.#model;
    if (!this.#turn && this.#position > 0) {
      const others = this.#position === 1 ? "1 request is" : `${this.#position} requests are`;
      return `Waiting: ${others} before this one`;
    }
    if (this.scale === null) return "Asking the service";
    if (this.#share === 1) return "Finishing";
    const [rows, columns] = grids[this.scale];
    return `Generating scale ${this.scale + 1} of ${scales} (${columns} × ${rows})`;
  }

  #which() {
    const { batch } = this.#model;
    if (this.#count <= batch || this.scale === null) return "";
    const last = Math.min(this.#first + batch, this.#count);
    const from = this.#first + 1;
    return from === last
      ? `picture ${last} of ${this.#count}`
      : `pictures ${from} to ${last} of ${this.#count}`;
  }

  #time() {
    const { elapsed, expected } = this;
    if (elapsed < SHOWN_FROM && !(this.#turn && expected > SHOWN_FROM)) return "";
    const whole = Math.floor(elapsed);
    if (!this.#turn || expected === null) return seconds(whole);
    return `${seconds(whole)} of about ${seconds(Math.max(Math.ceil(expected), whole + 1))}`;
  }
}

/** "42 s", "3 min 5 s". */
export function seconds(value) {
  if (value < 60) return `${value} s`;
  const [minutes, rest] = [Math.floor(value / 60), Math.round(value % 60)];
  return rest ? `${minutes} min ${rest} s` : `${minutes} min`;
}

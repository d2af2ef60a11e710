/** Pictures that outlive a reload: in the browser's IndexedDB, within bounds. */

const NAME = "var-deploy";
const STORE = "pictures";
const MOST = 240; // pictures
const MOST_BYTES = 64e6;
const SCALES_BYTES = 24e6; // of the newest pictures' previews: older ones lose them

/**
 * Records of pictures by key, of all models that this address has served.
 *
 * Where the browser keeps nothing (a private window, a full disk), `persistent` is false and the
 * pictures last as long as the page.
 */
export class PictureStore {
  #database = null;
  #opening = null; // what ends once it is known whether there is a database
  #records = []; // {key, digest, size, scalesSize}, the newest first

  get persistent() {
    return this.#database !== null;
  }

  /** The pictures of the model with this digest, the newest first. To be called first. */
  open(digest) {
    return (this.#opening = this.#open(digest));
  }

  async #open(digest) {
    try {
      const opening = indexedDB.open(NAME, 1);
      opening.onupgradeneeded = () =>
        opening.result.createObjectStore(STORE, { keyPath: "key", autoIncrement: true });
      this.#database = await result(opening);
      const found = (await result(this.#store("readonly").getAll())).reverse();
      this.#records = found.map(measured);
      await this.#trim();
      const kept = new Set(this.#records.map(({ key }) => key));
      return found.filter((picture) => picture.digest === digest && kept.has(picture.key));
    } catch (error) {
      this.#giveUp(error);
      return [];
    }
  }

  /** Keep a picture, which gets its key; the keys of those that had to go for it. */
  async add(picture) {
    await this.#opening;
    if (!this.persistent) return [];
    try {
      picture.key = await result(this.#store("readwrite").add({ ...picture }));
      this.#records.unshift(measured(picture));
      return await this.#trim();
    } catch (error) {
      this.#giveUp(error);
      return [];
    }
  }

  async remove(keys) {
    if (!this.persistent || !keys.length) return;
    const gone = new Set(keys);
    this.#records = this.#records.filter(({ key }) => !gone.has(key));
    const store = this.#store("readwrite");
    await Promise.all(keys.map((key) => result(store.delete(key))));
  }

  /** Drop the oldest pictures beyond the bounds; their keys. */
  async #trim() {
    let [bytes, scalesBytes] = [0, 0];
    const gone = [];
    for (const [n, record] of this.#records.entries()) {
      scalesBytes += record.scalesSize;
      if (record.scalesSize && scalesBytes > SCALES_BYTES) await this.#dropScales(record);
      bytes += record.size + record.scalesSize;
      if (n >= MOST || bytes > MOST_BYTES) gone.push(record.key);
    }
    await this.remove(gone);
    return gone;
  }

  async #dropScales(record) {
    const picture = await result(this.#store("readonly").get(record.key));
    record.scalesSize = 0;
    if (picture) await result(this.#store("readwrite").put({ ...picture, scales: [] }));
  }

  #store(mode) {
    return this.#database.transaction(STORE, mode).objectStore(STORE);
  }

  #giveUp(error) {
    console.warn("pictures are not kept beyond this page:", error);
    this.#database?.close();
    this.#database = null;
  }
}

/** What the bounds need to know of a picture; its texts are ASCII. */
function measured({ key, png, before, scales }) {
  const size = png.length + (before?.length ?? 0);
  return { key, size, scalesSize: scales.reduce((sum, text) => sum + (text?.length ?? 0), 0) };
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => reject(request.error ?? new Error("blocked"));
  });
}

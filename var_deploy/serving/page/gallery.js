/** Thumbnails of the pictures that were made, the newest first, and all of them as one file. */

import { zip } from "./zip.js";

const $ = (id) => document.getElementById(id);
const MOST = 240; // pictures, also where the browser keeps none
const MOST_WHOLE = 48; // of these with what they were after each scale
const LONGEST = 80; // characters of a prompt in a name

/** What a picture is called where it is not seen. */
export function nameOf(picture) {
  const { label, prompt, kind, seed } = picture;
  const nothing = kind === "edit" ? "edited picture" : prompt === "" ? "no prompt" : "no class";
  const named = typeof label === "number" ? `class ${label}` : (label ?? nothing);
  const what = prompt ? shortened(prompt) : named;
  const how = kind === "vary" ? `, varied from scale ${picture.fromScale + 1}` : "";
  return `${what}, seed ${seed}${how}`;
}

function shortened(text) {
  const characters = [...text]; // so that none is cut in half
  if (characters.length <= LONGEST) return text;
  return `${characters.slice(0, LONGEST).join("").trimEnd()}…`;
}

export const fileNameOf = (picture) => `${nameOf(picture).replace(/[^\p{L}\p{N}]+/gu, "-")}.png`;

export class Gallery {
  /** `onOpen` is called with the picture that is chosen. */
  constructor(store, onOpen) {
    this.store = store;
    this.onOpen = onOpen;
    this.pictures = []; // newest first
    $("download-all").addEventListener("click", () =>
      download([...this.pictures].reverse(), "pictures.zip"),
    );
    $("clear-history").addEventListener("click", () => this.#clear());
  }

  /** Show what was kept from earlier visits. */
  async load(digest) {
    const former = await this.store.open(digest);
    this.pictures.push(...former);
    $("gallery").append(...former.map((picture) => this.#thumbnail(picture)));
    this.#refresh();
  }

  async add(picture) {
    this.pictures.unshift(picture);
    $("gallery").prepend(this.#thumbnail(picture));
    if (this.pictures.length > MOST_WHOLE) this.pictures[MOST_WHOLE].scales = [];
    if (this.pictures.length > MOST) this.#drop(this.pictures.at(-1));
    this.#refresh();
    const gone = new Set(await this.store.add(picture));
    this.pictures.filter(({ key }) => gone.has(key)).forEach((old) => this.#drop(old));
    this.#refresh();
  }

  async #clear() {
    const count = this.pictures.length;
    const what = count === 1 ? "the picture" : `all ${count} pictures`;
    if (!confirm(`Delete ${what} of the history? This cannot be undone.`)) return;
    await this.store.remove(this.pictures.map(({ key }) => key).filter((key) => key !== undefined));
    this.pictures = [];
    $("gallery").replaceChildren();
    this.#refresh();
    $("gallery-title").focus();
  }

  #drop(picture) {
    const n = this.pictures.indexOf(picture);
    this.pictures.splice(n, 1);
    $("gallery").children[n].remove();
  }

  #thumbnail(picture) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = document.createElement("img");
    Object.assign(image, { src: picture.png, alt: nameOf(picture), loading: "lazy" });
    button.type = "button";
    button.title = nameOf(picture);
    button.append(image);
    button.addEventListener("click", () => this.onOpen(picture));
    item.append(button);
    return item;
  }

  #refresh() {
    const some = this.pictures.length > 0;
    $("gallery-actions").hidden = !some;
    const where = this.store.persistent
      ? `Kept in this browser, and nowhere else: the last ${MOST} pictures at most.`
      : "Kept until you leave the page: this browser stores nothing for it.";
    $("gallery-hint").textContent = some ? where : "Pictures that you make are listed here.";
  }
}

/** Save pictures as one ZIP file. */
export function download(pictures, fileName) {
  const digits = String(pictures.length).length;
  const files = pictures.map((picture, n) => ({
    name: `${String(n + 1).padStart(digits, "0")}-${fileNameOf(picture)}`,
    bytes: bytesOf(picture.png),
  }));
  const url = URL.createObjectURL(zip(files));
  Object.assign(document.createElement("a"), { href: url, download: fileName }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // once the browser has surely begun
}

function bytesOf(dataUrl) {
  return Uint8Array.from(atob(dataUrl.split(",")[1]), (character) => character.charCodeAt(0));
}

/** Finding a class by what a person types: its number, its name, a synonym, or a part of one. */

/** The classes of a model, numbered from 0. */
export class Classes {
  /** `names` may be empty, and `synonyms` has a list for each name. */
  constructor(count, names = [], synonyms = []) {
    this.names = names;
    this.entries = Array.from({ length: count }, (_, number) => {
      const name = names[number] ?? `class ${number}`;
      const parts = names.length ? name.split(",") : [];
      const others = [...parts, ...(synonyms[number] ?? [])].map(fold);
      // a note, as in "crane (bird)", need not be typed
      others.push(...others.map((other) => other.replace(/ \([^()]*\)$/, "")));
      return { number, name, shown: synonyms[number] ?? [], folded: fold(name), others };
    });
  }

  get count() {
    return this.entries.length;
  }

  /** What a person calls a class; null is "no class". */
  nameOf(number) {
    return number === null ? null : this.entries[number].name;
  }

  /** What the service and a link are told: the name, or the number where the name is not unique. */
  labelOf(number) {
    if (number === null || !this.names.length) return number;
    const { name, folded } = this.entries[number];
    const alone = this.entries.filter((entry) => entry.folded === folded).length === 1;
    return alone && !/^[+-]?\d+$/.test(folded) ? name : number;
  }

  /** The numbers of the classes that a text names in full: one, where it is clear. */
  named(text) {
    const wanted = fold(text);
    if (/^\d{1,9}$/.test(wanted)) return Number(wanted) < this.count ? [Number(wanted)] : [];
    const whole = this.entries.filter(({ folded }) => folded === wanted);
    const found = whole.length
      ? whole
      : this.entries.filter(({ others }) => others.includes(wanted));
    return found.map(({ number }) => number);
  }

  /** The entries that a text may mean, the likeliest first; all of them where it is empty. */
  search(text) {
    const wanted = fold(text);
    if (!wanted) return this.entries;
    return this.entries
      .map((entry) => [rank(entry, wanted), entry])
      .filter(([place]) => place < Infinity)
      .sort(([a, one], [b, other]) => a - b || one.number - other.number)
      .map(([, entry]) => entry);
  }
}

/** 0 for the class that is meant in full, more for less likely ones, Infinity for others. */
function rank({ number, folded, others }, wanted) {
  const digits = String(number);
  if (folded === wanted || digits === wanted) return 0;
  if (others.includes(wanted)) return 1;
  if (` ${folded} `.includes(` ${wanted} `)) return 2; // a word of it
  if (` ${folded}`.includes(` ${wanted}`)) return 3; // the beginning of one
  if (others.some((other) => ` ${other}`.includes(` ${wanted}`))) return 4;
  if (digits.startsWith(wanted)) return 5;
  if (wanted.length > 2 && [folded, ...others].some((text) => text.includes(wanted))) return 6;
  return Infinity;
}

/** Without case, accents, underscores and spaces that do not matter. */
function fold(text) {
  const plain = text.normalize("NFD").replace(/\p{M}/gu, "");
  return plain.replaceAll("_", " ").trim().replace(/\s+/g, " ").toLowerCase();
}

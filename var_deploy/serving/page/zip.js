/** ZIP archives of files that are compressed already: stored as they are (APPNOTE 6.3.3). */

const LOCAL = 0x04034b50; // signatures
const CENTRAL = 0x02014b50;
const END = 0x06054b50;
const VERSION = 20; // of the format: 2.0
const UTF8 = 0x0800; // names are UTF-8
const NEW_YEAR = 0x0021; // 1980-01-01: the same pictures give the same archive

/** A Blob of `files`, each {name, bytes}. */
export function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, bytes } of files) {
    const text = new TextEncoder().encode(name);
    const sum = crc32(bytes);
    // what both headers share: version … length of the extra field
    const shared = [2, VERSION, 2, UTF8, 2, 0, 2, 0, 2, NEW_YEAR, 4, sum];
    shared.push(4, bytes.length, 4, bytes.length, 2, text.length, 2, 0);
    parts.push(record(4, LOCAL, ...shared), text, bytes);
    const rest = [2, 0, 2, 0, 2, 0, 4, 0, 4, offset]; // comment, disk, attributes, place
    directory.push(record(4, CENTRAL, 2, VERSION, ...shared, ...rest), text);
    offset += 30 + text.length + bytes.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const count = files.length;
  const end = record(4, END, 2, 0, 2, 0, 2, count, 2, count, 4, size, 4, offset, 2, 0);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

/** Little-endian numbers, each after its width in bytes. */
function record(...widthsAndValues) {
  const bytes = [];
  for (let n = 0; n < widthsAndValues.length; n += 2) {
    const [width, value] = [widthsAndValues[n], widthsAndValues[n + 1]];
    for (let byte = 0; byte < width; byte++) bytes.push((value >>> (8 * byte)) & 0xff);
  }
  return Uint8Array.from(bytes);
}

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

function crc32(bytes) {
  let sum = 0xffffffff;
  for (const byte of bytes) sum = (sum >>> 8) ^ TABLE[(sum ^ byte) & 0xff];
  return ~sum >>> 0;
}

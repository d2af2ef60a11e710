/** A person's own picture, and what a model sees of it. */

const MARGIN = 1.125; // the model sees the centre of a picture resized to this times its side
const SENT = ["image/png", "image/jpeg", "image/webp"]; // what the service opens
const SHORT = 1024; // pixels of the short side where a picture has to be written anew

/** {send, view}: a data: URL for the service, and a canvas of side × side. Throws Error. */
export async function openPicture(file, side, limits) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "That"} is not a picture that this browser can open.`);
  }
  const { width, height } = bitmap;
  const fits = width * height <= limits.pixels && file.size * 1.4 < limits.body;
  const send = fits && SENT.includes(file.type) ? await asDataUrl(file) : rewritten(bitmap);
  return { send, view: cut(bitmap, width, height, side) };
}

/** {send, view} as `openPicture`, of a picture that the service has generated. */
export async function openGenerated(url, side) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return { send: url, view: cut(image, image.naturalWidth, image.naturalHeight, side) };
}

function cut(image, width, height, side) {
  const view = document.createElement("canvas");
  view.width = view.height = side;
  const context = view.getContext("2d");
  context.fillStyle = "white"; // what is transparent lies on white, as for the model
  context.fillRect(0, 0, side, side);
  context.imageSmoothingQuality = "high";
  const whole = width === side && height === side;
  const part = whole ? side : (Math.min(width, height) * side) / Math.round(MARGIN * side);
  const left = (width - part) / 2;
  const top = (height - part) / 2;
  context.drawImage(image, left, top, part, part, 0, 0, side, side);
  return view;
}

/** Smaller, and in a format that the service opens. */
function rewritten(bitmap) {
  const factor = Math.min(1, SHORT / Math.min(bitmap.width, bitmap.height));
  // of a long strip only the middle is seen
  const square = Math.min(bitmap.width, bitmap.height);
  const width = Math.min(bitmap.width, 2 * square);
  const height = Math.min(bitmap.height, 2 * square);
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(width * factor);
  canvas.height = Math.round(height * factor);
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  const left = (bitmap.width - width) / 2;
  const top = (bitmap.height - height) / 2;
  context.drawImage(bitmap, left, top, width, height, 0, 0, canvas.width, canvas.height);
  const small = canvas.width * canvas.height <= 512 * 512; // a drawing, which JPEG would blur
  return canvas.toDataURL(small ? "image/png" : "image/jpeg", 0.95);
}

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

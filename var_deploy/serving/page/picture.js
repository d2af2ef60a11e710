/** A person's own picture, and what a model sees of it. */

// a model of classes sees the centre of a picture resized to this times its side; one of prompts
// sees the centre of a picture that just covers its frame
const MARGIN = 1.125;
const SENT = ["image/png", "image/jpeg", "image/webp"]; // what the service opens
const SHORT = 1024; // pixels of the short side where a picture has to be written anew

/** {send, view}: a data: URL for the service, and a canvas of the model's size. Throws Error. */
export async function openPicture(file, model) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "That"} is not a picture that this browser can open.`);
  }
  const { width, height } = bitmap;
  const { limits } = model;
  const fits = width * height <= limits.pixels && file.size * 1.4 < limits.body;
  const send = fits && SENT.includes(file.type) ? await asDataUrl(file) : rewritten(bitmap, model);
  return { send, view: cut(bitmap, width, height, model) };
}

/** {send, view} as `openPicture`, of a picture that the service has generated. */
export async function openGenerated(url, model) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return { send: url, view: cut(image, image.naturalWidth, image.naturalHeight, model) };
}

function cut(image, width, height, model) {
  const view = document.createElement("canvas");
  view.width = model.width;
  view.height = model.height;
  const context = view.getContext("2d");
  context.fillStyle = "white"; // what is transparent lies on white, as for the model
  context.fillRect(0, 0, view.width, view.height);
  context.imageSmoothingQuality = "high";
  const whole = width === view.width && height === view.height;
  const margin = model.takes === "prompts" ? 1 : Math.round(MARGIN * view.width) / view.width;
  const covered = Math.min(width / view.width, height / view.height);
  const pixel = whole ? 1 : covered / margin; // of the view, in pixels of the picture
  const [across, down] = [pixel * view.width, pixel * view.height];
  const [left, top] = [(width - across) / 2, (height - down) / 2];
  context.drawImage(image, left, top, across, down, 0, 0, view.width, view.height);
  return view;
}

/** Smaller, and in a format that the service opens. */
function rewritten(bitmap, model) {
  const factor = Math.min(1, SHORT / Math.min(bitmap.width, bitmap.height));
  // of a long strip only the middle is seen
  const ratio = model.width / model.height;
  const width = Math.min(bitmap.width, Math.round(2 * bitmap.height * ratio));
  const height = Math.min(bitmap.height, Math.round((2 * bitmap.width) / ratio));
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

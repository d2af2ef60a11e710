/**
 * Requests to the service: {kind, path, body, pictures}, where `pictures` are those to come, in the
 * order of the answer, with what is known of them before. Settings hold `labels`, class numbers, or
 * where the bundle takes prompts, `prompt` and `negative`.
 */

/**
 * Pictures of classes or of a prompt: each has a seed of its own, so that each can be generated
 * again alone.
 */
export function generateRequest(classes, settings) {
  const labels = settings.labels.map((number) => classes.labelOf(number));
  const nothing = labels.length === 1 && labels[0] === null;
  const what = settings.prompt === undefined ? { labels: nothing ? null : labels } : said(settings);
  return {
    kind: "generate",
    path: "v1/images/stream",
    body: { ...common(settings), ...what },
    pictures: blanks("generate", classes, settings),
    settings,
  };
}

/** A part of a picture filled: `source` is {send, view}, `mask` a data: URL. */
export function editRequest(classes, settings, source, mask, keepPixels) {
  const pictures = { image: source.send, mask };
  const what = whatToPutThere(classes, settings);
  return {
    kind: "edit",
    path: "v1/edit/stream",
    body: { ...pictures, ...what, ...common(settings), keep_pixels: keepPixels },
    pictures: blanks("edit", classes, settings, { before: source.view.toDataURL() }),
    settings,
  };
}

/** More pictures like one that was generated: its tokens stay before `fromScale`. */
export function varyRequest(classes, settings, picture, fromScale) {
  const what = whatToPutThere(classes, settings);
  return {
    kind: "vary",
    path: "v1/vary/stream",
    body: { image: picture.png, from_scale: fromScale, ...what, ...common(settings) },
    pictures: blanks("vary", classes, settings, { before: picture.png, fromScale }),
    settings,
  };
}

function whatToPutThere(classes, settings) {
  if (settings.prompt !== undefined) return said(settings);
  return { label: classes.labelOf(settings.labels[0]) };
}

const said = ({ prompt, negative }) => ({ prompt, ...(negative ? { negative } : {}) });

function common({ seed, count, cfg, top_k, top_p, temperature }) {
  const given = Object.entries({ cfg, top_k, top_p, temperature });
  const chosen = Object.fromEntries(given.filter(([, value]) => value != null));
  return { count, seed: Array.from({ length: count }, (_, n) => seed + n), ...chosen };
}

/** Each with the settings that generate it alone. */
function blanks(kind, classes, settings, rest = { before: null }) {
  return Array.from({ length: settings.count }, (_, n) => {
    const number = settings.labels[n % settings.labels.length];
    const seed = settings.seed + n;
    const own = { ...settings, labels: [number], seed, count: 1 };
    const label = settings.prompt === undefined ? classes.nameOf(number) : null;
    const what = { label, prompt: settings.prompt, seed };
    return { kind, ...what, settings: own, png: null, scales: [], ...rest };
  });
}

/**
 * Requests to the service: {kind, path, body, pictures}, where `pictures` are those to come, in the
 * order of the answer, with what is known of them before.
 */

/** Pictures of classes: each has a seed of its own, so that each can be generated again alone. */
export function generateRequest(classes, settings) {
  const labels = settings.labels.map((number) => classes.labelOf(number));
  const nothing = labels.length === 1 && labels[0] === null;
  return {
    kind: "generate",
    path: "v1/images/stream",
    body: { ...common(settings), labels: nothing ? null : labels },
    pictures: blanks("generate", classes, settings),
    settings,
  };
}

/** A part of a picture filled: `source` is {send, view}, `mask` a data: URL. */
export function editRequest(classes, settings, source, mask, keepPixels) {
  const label = classes.labelOf(settings.labels[0]);
  const pictures = { image: source.send, mask };
  return {
    kind: "edit",
    path: "v1/edit/stream",
    body: { ...pictures, label, ...common(settings), keep_pixels: keepPixels },
    pictures: blanks("edit", classes, settings, { before: source.view.toDataURL() }),
    settings,
  };
}

/** More pictures like one that was generated: its tokens stay before `fromScale`. */
export function varyRequest(classes, settings, picture, fromScale) {
  const label = classes.labelOf(settings.labels[0]);
  return {
    kind: "vary",
    path: "v1/vary/stream",
    body: { image: picture.png, from_scale: fromScale, label, ...common(settings) },
    pictures: blanks("vary", classes, settings, { before: picture.png, fromScale }),
    settings,
  };
}

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
    const label = classes.nameOf(number);
    return { kind, label, seed, settings: own, png: null, scales: [], ...rest };
  });
}

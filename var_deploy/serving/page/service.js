/** The service. Addresses are relative, so that the page works below a path of a proxy too. */

const LOST = "The connection was lost before the picture was finished. Is the service running?";

/** Why there is no picture, in a sentence; `retry`: the same request may succeed later. */
export class Refusal extends Error {
  constructor(message, retry = false) {
    super(message);
    this.retry = retry;
  }
}

export async function readModel() {
  const response = await reach("v1/model", {});
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/**
 * The events of a POST to `path`, as [name, data], ending with "done".
 *
 * Throws Refusal; what fetch throws where `signal` is aborted passes through.
 */
export async function* events(path, body, signal) {
  const response = await reach(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Refusal(LOST, true);
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const [name, data] = parse(block);
        if (name === "error") throw new Refusal(sentence(data.error), true);
        if (!name) continue; // a comment that keeps the connection open
        yield [name, data];
        if (name === "done") return;
      }
    }
  } catch (error) {
    if (error instanceof Refusal || signal.aborted) throw error;
    throw new Refusal(LOST, true);
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Refusal("The service cannot be reached. Is it running?", true);
  }
}

/** An event as https://html.spec.whatwg.org/multipage/server-sent-events.html writes it. */
function parse(block) {
  let name = "";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5));
  }
  return [name, data.length ? JSON.parse(data.join("\n")) : null];
}

async function refusal(response) {
  const { status } = response;
  let reason = "";
  try {
    reason = (await response.json()).error;
  } catch {
    reason = response.statusText; // an answer of a proxy, not of the service
  }
  if (status === 429) {
    const wait = Number(response.headers.get("Retry-After"));
    const when = wait > 0 ? `in ${wait} second${wait === 1 ? "" : "s"}` : "in a moment";
    return new Refusal(`The service is busy: its queue is full. Try again ${when}.`, true);
  }
  if (status === 413) return new Refusal(`That is too large: ${sentence(reason, false)}`);
  if (status >= 500) return new Refusal(sentence(reason || `The service failed (${status})`), true);
  return new Refusal(sentence(reason || `The service refused (${status})`));
}

/** A line of the service as a sentence: a capital in front, a full stop behind. */
function sentence(text, capital = true) {
  const end = /[.?!…]$/.test(text) ? "" : ".";
  return (capital ? text.charAt(0).toUpperCase() + text.slice(1) : text) + end;
}

/** The field of a prompt: examples to click, and a mark under each word the model does not know. */

const $ = (id) => document.getElementById(id);

// as the service finds them: letters and digits, or the signs between them
const WORDS = /[\p{L}\p{N}\p{M}_]+|[^\p{L}\p{N}\p{M}_\s]+/gu;

const SHOWN = 4; // examples

export class PromptField {
  /** `examples` are prompts to begin with. */
  constructor(examples) {
    this.examples = examples;
    this.unknown = new Set(); // as far as the service has told
    $("examples").append(...examples.slice(0, SHOWN).map((text) => this.#button(text)));
    $("examples").hidden = !examples.length;
    this.suggest(null);
    $("prompt").addEventListener("input", () => this.#mark());
    $("prompt").addEventListener("scroll", () => this.#follow());
    // as high as somebody has drawn the field
    new ResizeObserver(() => this.#follow()).observe($("prompt"));
  }

  set value(text) {
    $("prompt").value = text;
    this.#mark();
  }

  /** What an empty field says: `text`, or an example where it is null. */
  suggest(text) {
    const [example] = this.examples;
    $("prompt").placeholder = text ?? (example ? `such as: ${example}` : "");
  }

  /** Show lines about the prompt that was sent, and mark the words `unknown`. */
  remark(lines, unknown) {
    $("prompt-remarks").textContent = lines.join("\n");
    for (const word of unknown) this.unknown.add(word);
    this.#mark();
  }

  /** Repeat the text behind the field, where a word can have a mark of its own. */
  #mark() {
    const text = $("prompt").value;
    const parts = [];
    let done = 0;
    for (const { 0: word, index } of text.matchAll(WORDS)) {
      if (!this.unknown.has(word)) continue;
      const mark = document.createElement("mark");
      mark.textContent = word;
      parts.push(text.slice(done, index), mark);
      done = index + word.length;
    }
    // a last line that is empty has height only with something in it
    $("prompt-marks").replaceChildren(...parts, `${text.slice(done)}\u200b`);
    this.#follow();
  }

  #follow() {
    $("prompt-marks").style.width = `${$("prompt").clientWidth}px`; // without the scroll bar
    $("prompt-marks").scrollTop = $("prompt").scrollTop;
  }

  #button(text) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => {
      this.value = text;
      $("prompt").focus(); // where Enter starts
    });
    return button;
  }
}

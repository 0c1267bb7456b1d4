// A completion's tokens in chunks. The first is there at once. Any other is one text until the browser
// has time, then elements, so that its search finds every word in place; it costs no layout and has no
// colours until it comes near the screen, or a link, a key or a fork leads into it.

const CHUNK = 256;
const whenIdle = window.requestIdleCallback ?? setTimeout;
let unfilled = [];

// {body, spans, waiting}: the box of the tokens, their elements, and the chunks not shown yet, by number.
function tokenBox(view, place) {
  const { start, stop, index } = view.group.completions[place];
  const body = h("div", {
    class: "tokens", dir: "ltr", role: "group", "data-testid": "tokens",
    "aria-label": `tokens of completion ${index}`,
  });
  const box = { body, spans: new Array(stop - start), waiting: new Map() };
  for (let number = 0; number * CHUNK < stop - start; number++) {
    const chunk = document.createElement("span");
    const from = start + number * CHUNK;
    chunk.tokens = { view, place, number, spans: box.spans, from, to: Math.min(from + CHUNK, stop), first: start };
    if (number === 0) fill(chunk);
    else {
      chunk.className = "later";
      chunk.textContent = textOf(chunk.tokens);
      box.waiting.set(number, chunk);
      unfilled.push(chunk);
      nearScreen.observe(chunk);
    }
    body.append(chunk);
  }
  if (start === stop) body.append(h("em", {}, "empty"));
  return box;
}

// What an earlier group left to do is done with.
function forgetChunks() {
  nearScreen.disconnect();
  unfilled = [];
}

function fillWhenIdle() {
  const chunk = unfilled.shift();
  if (!chunk) return;
  fill(chunk);
  whenIdle(fillWhenIdle);
}

function textOf({ view, from, to }) {
  let text = "";
  for (let at = from; at < to; at++) text += shownToken(view, at);
  return text;
}

function shownToken({ step }, at) {
  const id = step.tokens.token_ids[at];
  return isEos(step.meta, id) ? `\u25a0${shownPiece(id)}` : shownPiece(id);
}

function fill(chunk) {
  const { view, spans, from, to, first } = chunk.tokens;
  if (spans[from - first]) return;
  const box = document.createDocumentFragment();
  for (let at = from; at < to; at++) {
    const span = document.createElement("span");
    span.textContent = shownToken(view, at);
    span.token = at - first;
    spans[span.token] = span;
    box.append(span);
  }
  chunk.replaceChildren(box);
}

function showChunk(chunk) {
  const { view, place, number, from, to, first } = chunk.tokens;
  view.columns[place].waiting.delete(number);
  nearScreen.unobserve(chunk);
  fill(chunk);
  chunk.className = "";
  paintTokens(view, place, from - first, to - first);
}

// The element of a token, whose chunk is shown for it.
function spanAt(view, place, token) {
  const { spans, waiting } = view.columns[place];
  const chunk = waiting.get(Math.floor(token / CHUNK));
  if (chunk) showChunk(chunk);
  return spans[token];
}

const nearScreen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) showChunk(target);
}, { rootMargin: "400px", scrollMargin: "400px" });

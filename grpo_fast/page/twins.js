// Completions with the same tokens and the same reward are one card with "× 5" until it is unfolded.

// For every completion: how many share its reward, and the places and indices of those with its tokens.
function twinsOf(view) {
  const ids = view.step.tokens.token_ids;
  const { completions } = view.group;
  const same = new Map(), ties = new Map();
  const keys = completions.map(({ start, stop, reward }, place) => {
    const key = ids.subarray(start, stop).join(",");
    if (!same.has(key)) same.set(key, []);
    same.get(key).push(place);
    ties.set(reward, (ties.get(reward) ?? 0) + 1);
    return key;
  });
  return completions.map(({ reward }, place) => {
    const others = same.get(keys[place]).filter((other) => other !== place);
    return {
      tied: reward == null ? 1 : ties.get(reward), places: others,
      copies: others.map((other) => completions[other].index),
      unlike: others.some((other) => completions[other].reward !== reward),
    };
  });
}

// {first, rest, open} for every set of equal completions, in the order of the cards.
function foldsOf(view, twins) {
  const done = new Set(), folds = [];
  for (const place of view.order) {
    if (done.has(place)) continue;
    const { reward } = view.group.completions[place];
    const rest = view.order.filter((other) =>
      twins[place].places.includes(other) && view.group.completions[other].reward === reward);
    rest.forEach((other) => done.add(other));
    if (rest.length) folds.push({ first: place, rest, open: false });
  }
  return folds;
}

// The button of the card that stands for the others, null on every other card.
function foldOf(view, place) {
  const fold = view.folds.find(({ first }) => first === place);
  if (!fold) return null;
  fold.button = h("button", { type: "button", class: "same", "data-testid": "fold" });
  fold.button.addEventListener("click", () => {
    fold.open = !fold.open;
    showFold(view, fold);
  });
  return fold.button;
}

function showFold(view, { first, rest, open, button }) {
  const count = rest.length + 1;
  button.textContent = `\u00d7 ${count}`;
  button.title = open ? "show one of them" : `show all ${count}: same tokens, same reward`;
  button.setAttribute("aria-expanded", String(open));
  button.setAttribute("aria-label", `${count} completions with the same tokens and reward`);
  // Beside the card that stands for them, and no column of their own until then.
  rest.forEach((place, k) => {
    const { element } = view.columns[place];
    if (open) view.columns[k ? rest[k - 1] : first].element.after(element);
    element.classList.toggle("twin", open);
    element.hidden = !open;
  });
}

function unfoldAround(view, place) {
  const fold = view.folds.find(({ rest, open }) => !open && rest.includes(place));
  if (!fold) return;
  fold.open = true;
  showFold(view, fold);
}

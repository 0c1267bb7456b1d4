// One group: its prompt, its completions in columns by reward, and what marks them.

const MANY_TOKENS = 5000;

function orderOf(group) {
  const rank = (c) => c.reward ?? -Infinity;
  return group.completions.map((_, place) => place).sort((a, b) => {
    const [one, two] = [group.completions[a], group.completions[b]];
    return rank(two) - rank(one) || one.index - two.index || 0;
  });
}

function chipsOf(completion, twins, size) {
  const chips = [];
  const cut = completion.finish_reason === "length";
  if (completion.finish_reason) chips.push([cut ? "cut" : "", cut ? "cut at the longest length" : `ended by ${completion.finish_reason}`]);
  if (twins.tied > 1) chips.push(["tie", `tie of ${twins.tied}${twins.tied === size ? ": all equal" : ""}`]);
  if (twins.copies.length) {
    const others = twins.copies.slice(0, 3).map((index) => `#${index}`).join(", ");
    chips.push(["copy", `same tokens as ${others}${twins.copies.length > 3 ? " and more" : ""}`]);
    if (twins.unlike) chips.push(["cut", "and another reward"]);
  }
  return h("p", { class: "chips" }, ...chips.map(([kind, text]) => h("span", { class: `chip ${kind}` }, text)));
}

function columnOf(view, place, twins) {
  const completion = view.group.completions[place];
  const advantage = completion.advantage;
  const parts = Object.entries(completion.rewards ?? {});
  const tokens = tokenBox(view, place);
  const drop = h("input", { type: "checkbox", "data-testid": "drop", disabled: view.rule.reason != null });
  drop.checked = view.settings.dropped.has(place);
  drop.addEventListener("change", () => {
    view.settings.dropped[drop.checked ? "add" : "delete"](place);
    view.changed();
  });
  const element = h("article", {
    class: `card completion${advantage > 0 ? " winner" : ""}`, "data-testid": "completion", "data-index": completion.index,
  },
  h("header", {},
    h("h4", {}, advantage > 0 ? h("span", { title: "above its group" }, "\u25b2 ") : null, `#${completion.index}`,
      h("b", { "data-testid": "reward" }, completion.reward == null ? "not scored" : `reward ${short(completion.reward)}`),
      foldOf(view, place),
      h("label", { class: "drop", title: view.rule.reason ?? "what if it had not been there" }, drop, "drop")),
    h("p", { class: "facts" },
      `advantage ${advantage == null ? "not scored" : short(advantage, true)}`,
      h("span", { "data-testid": "whatif-advantage" }), ` \u00b7 ${plural(completion.stop - completion.start, "token")}`),
    parts.length > 1 || (parts.length === 1 && parts[0][1] !== completion.reward)
      ? h("p", { class: "facts parts" }, parts.map(([name, value]) => `${name} ${value == null ? "not scored" : short(value)}`).join(" \u00b7 "))
      : null,
    chipsOf(completion, twins, view.group.size)),
  tokens.body);
  return { element, ...tokens };
}

function drawGroup(view) {
  forgetChunks();
  const { group, step } = view;
  view.order = orderOf(group);
  const twins = twinsOf(view);
  view.folds = foldsOf(view, twins);
  view.columns = group.completions.map((_, place) => columnOf(view, place, twins[place]));
  const found = chosenForks(view);
  view.forks = found.forks;
  view.forkCount = found.count;
  view.forkPlaces = group.completions.map(() => new Set());
  for (const { depth, members } of view.forks) for (const place of members) view.forkPlaces[place].add(depth);
  $("xray-prompt").textContent = visiblePrompt(group.prompt);
  $("xray-kept").textContent = `Kept in the log: ${step.meta.kept}.`;
  const stored = group.completions.length;
  $("xray-about").textContent = `Step ${step.meta.step}, group ${group.index}` +
    (group.row == null || group.row === group.index ? "" : ` (dataset row ${group.row})`) +
    `: ${stored === group.size ? plural(stored, "completion") : `${stored} of ${group.size} completions stored`}` +
    (group.chosen_by?.length ? `, kept as ${inWords(group.chosen_by)}` : "") +
    (step.meta.iteration ? `; iteration ${step.meta.iteration} of the step` : "") + ".";
  const tokens = group.completions.reduce((sum, { start, stop }) => sum + stop - start, 0);
  $("xray-columns").classList.toggle("many", tokens > MANY_TOKENS);
  $("xray-columns").replaceChildren(...view.order.map((place) => view.columns[place].element));
  view.folds.forEach((fold) => showFold(view, fold));
  drawTrend(view);
  drawFixture(view);
  drawForks(view);
  drawPush(view);
}

// A prompt is read as text: only what hides or turns text around is escaped.
function visiblePrompt(prompt) {
  const text = typeof prompt === "string" ? prompt : JSON.stringify(prompt);
  return text.replace(HIDDEN, (c) => (c === "\n" || c === "\t" ? c : escaped(c)));
}

function showAdvantages(view) {
  const { advantages, result } = view.whatif;
  view.columns.forEach(({ element }, place) => {
    const box = element.querySelector("[data-testid=whatif-advantage]");
    const before = view.trained.advantages[place];
    const dropped = view.settings.dropped.has(place);
    const text = dropped ? ", dropped" : advantages[place] !== before ? `, what if ${short(advantages[place], true)}` : "";
    box.textContent = result.reason ? "" : text;
    box.dataset.value = String(advantages[place]);
    element.classList.toggle("dropped", dropped);
  });
}

function tokenOf(target) {
  const span = target instanceof Element ? target.closest(".t") : null;
  return span && span.token != null ? span : null;
}

function placeOf(view, span) {
  return view.columns.findIndex(({ body }) => body.contains(span));
}

// One listener for all tokens of the group, whatever group is shown.
function listenToTokens(current) {
  const box = $("xray-columns");
  const show = (event, pin) => {
    const view = current();
    const span = tokenOf(event.target);
    if (!span || !view) return;
    const place = placeOf(view, span);
    if (pin) moveTo(view, place, span.token, true);
    else if (!view.pinned) drawWhy(view, place, span.token);
  };
  box.addEventListener("click", (event) => show(event, true));
  box.addEventListener("mouseover", (event) => show(event, false));
  box.addEventListener("focusin", (event) => show(event, false));
  box.addEventListener("keydown", (event) => {
    const view = current();
    const span = tokenOf(event.target);
    if (!span || !view || event.altKey || event.ctrlKey || event.metaKey) return;
    const { place } = view.active;
    const seen = view.order.filter((other) => !view.columns[other].element.hidden);
    const row = seen.indexOf(place);
    const moves = {
      ArrowRight: [place, span.token + 1], ArrowLeft: [place, span.token - 1],
      Home: [place, 0], End: [place, Infinity], Enter: [place, span.token], " ": [place, span.token],
      ArrowDown: [seen[row + 1], span.token], ArrowUp: [seen[row - 1], span.token],
    };
    if (event.key === "Escape") view.pinned = false;
    const to = moves[event.key];
    if (!to) return;
    event.preventDefault();
    event.stopPropagation();
    moveTo(view, to[0] ?? place, to[1], true);
  });
}

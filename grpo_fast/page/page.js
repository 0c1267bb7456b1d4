// The page comes to life: light or dark, the X-ray's step and group, keys, and links with #.

let view = null;
let opening = 0;

function readFragment() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (wanted.has(name) ? Number(wanted.get(name)) : null);
  return { step: number("step"), group: number("group"), channel: wanted.get("channel"), token: wanted.get("token") };
}

function remember(shown) {
  const wanted = new URLSearchParams({ step: shown.step.meta.step, group: shown.group.index });
  if (shown.channel !== "ratio") wanted.set("channel", shown.channel);
  if (shown.pinned) {
    wanted.set("token", `${shown.group.completions[shown.active.place].index}.${shown.active.token}`);
  }
  history.replaceState(null, "", `#${wanted}`);
}

// Shows the group at these places of the embedded steps; a later call wins over a slower one.
async function open(stepPlace, groupPlace, wanted = {}) {
  const turn = ++opening;
  const step = await stepAt(stepPlace);
  if (turn !== opening) return;
  const group = step.meta.groups[groupPlace];
  const channel = wanted.channel ?? view?.channel;
  view = {
    stepPlace, groupPlace, step, group,
    channel: channel in CHANNELS ? channel : "ratio",
    sequences: group.completions.map((completion) => sequenceOf(step, completion)),
    rule: advantageRule(step.meta, group),
    settings: trainedSettings(step.meta),
    active: { place: 0, token: 0 }, pinned: false,
    touched: () => JSON.stringify(comparable(view.settings)) !== JSON.stringify(comparable(trainedSettings(step.meta))),
    changed,
  };
  compare(view);
  if (channelReason(view, view.channel)) {
    view.channel = Object.keys(CHANNELS).find((name) => !channelReason(view, name)) ?? "logprob";
  }
  drawPickers();
  drawGroup(view);
  drawChannels(view);
  drawControls(view);
  view.active.place = view.order[0] ?? 0;
  changed();
  $("xray-why").replaceChildren(h("p", { class: "soft" }, "Point at a token, or press Enter on one."));
  pick(wanted.token);
  whenIdle(fillWhenIdle);
  $("xray").dataset.ready = `${step.meta.step}.${group.index}`;
}

function comparable(settings) {
  return { ...settings, dropped: [...settings.dropped].sort() };
}

function pick(token) {
  const [index, at] = (token ?? "").split(".").map(Number);
  const place = view.group.completions.findIndex((c) => c.index === index);
  if (place >= 0 && at >= 0) moveTo(view, place, at, false);
}

// After every move of a slider; `controls`: what can be moved has changed too.
function changed(controls = false) {
  compare(view);
  if (controls) drawControls(view);
  drawFigures(view);
  showAdvantages(view);
  if (controls) {
    view.columns.forEach(({ element }, place) => {
      element.querySelector("[data-testid=drop]").checked = view.settings.dropped.has(place);
    });
  }
  paint(view);
  if (view.pinned) drawWhy(view, view.active.place, view.active.token);
}

function drawPickers() {
  const steps = $("xray-step"), groups = $("xray-group");
  steps.replaceChildren(...island.steps.map(({ meta }, place) => h("option", { value: place }, `step ${meta.step}`)));
  steps.value = view.stepPlace;
  groups.replaceChildren(...view.step.meta.groups.map((group, place) => {
    const why = group.chosen_by?.length ? `: ${inWords(group.chosen_by)}` : "";
    return h("option", { value: place }, `group ${group.index}${why}`);
  }));
  groups.value = view.groupPlace;
}

function go(stepPlace, groupPlace, wanted) {
  const steps = island.steps.length;
  if (stepPlace < 0 || stepPlace >= steps) return Promise.resolve();
  const groups = island.steps[stepPlace].meta.groups.length;
  return open(stepPlace, clamp(groupPlace, 0, groups - 1), wanted).then(() => {
    sayMissing("");
    remember(view);
  });
}

// Without a wish: of the last step the group whose completions differ most in reward.
function mostTelling({ groups }) {
  const spread = ({ rewards }) => {
    const known = rewards.filter((r) => r != null);
    const mean = known.reduce((a, b) => a + b, 0) / known.length;
    return known.length ? known.reduce((sum, r) => sum + (r - mean) ** 2, 0) / known.length : 0;
  };
  const spreads = groups.map(spread);
  return spreads.indexOf(Math.max(...spreads));
}

function goToFragment(scroll) {
  const wanted = readFragment();
  const found = island.steps.findIndex(({ meta }) => meta.step === wanted.step);
  const stepPlace = found < 0 ? island.steps.length - 1 : found;
  const { meta } = island.steps[stepPlace];
  const groupPlace = found < 0 ? -1 : meta.groups.findIndex((group) => group.index === wanted.group);
  const missing = missingFrom(location.hash);
  // A token of the wanted group is none of the one shown instead.
  if (missing) wanted.token = null;
  open(stepPlace, groupPlace < 0 ? mostTelling(meta) : groupPlace, wanted).then(() => {
    sayMissing(missing && `${missing} Shown: step ${view.step.meta.step}, group ${view.group.index}.`);
    if (scroll) $("xray").scrollIntoView();
  });
}

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    if (!view || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.target.closest?.("input, select, textarea, .t")) {
      if (!event.target.closest(".t")) return;
    }
    const channel = Object.keys(CHANNELS)[Number(event.key) - 1];
    if (channel) setChannel(view, channel);
    else if (event.key === "j") go(view.stepPlace, view.groupPlace + 1);
    else if (event.key === "k") go(view.stepPlace, view.groupPlace - 1);
    else if (event.key === "ArrowRight") go(view.stepPlace + 1, view.groupPlace);
    else if (event.key === "ArrowLeft") go(view.stepPlace - 1, view.groupPlace);
  });
}

function startTheme() {
  const button = $("theme");
  const dark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const name = () => { button.textContent = dark() ? "light" : "dark"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    name();
  });
  name();
}

function startXray() {
  if (!island) return;
  $("xray-body").hidden = false;
  $("xray-step").addEventListener("change", (e) => go(Number(e.target.value), view.groupPlace));
  $("xray-group").addEventListener("change", (e) => go(view.stepPlace, Number(e.target.value)));
  listenToTokens(() => view);
  listenToKeys();
  addEventListener("hashchange", () => goToFragment(true));
  goToFragment(location.hash.includes("step="));
}

startTheme();
startCharts();
startXray();

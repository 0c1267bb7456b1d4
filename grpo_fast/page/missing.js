// A link may name what is not here: one sentence says so, why, and what there is instead.

const MOST_LISTED = 12;

function listed(numbers) {
  const more = numbers.length - MOST_LISTED;
  const shown = more > 0 ? [...numbers.slice(0, MOST_LISTED), `${more} more`] : numbers;
  return shown.length > 1 ? `${shown.slice(0, -1).join(", ")} and ${shown[shown.length - 1]}` : `${shown[0]}`;
}

// noun 3 [place] was not kept, or was and had no room; `here`: those of its kind that there are.
function sentence(noun, number, place, here, inLog) {
  const named = `${noun} ${visible(number, 40).replace(/\u200b\u00b7/g, " ")}${place}`;
  const said = inLog ? `${named} is in the log, but left out of this page to keep it small`
    : `${named} was not kept in the log`;
  const instead = `here ${here.length === 1 ? `is ${noun}` : `are ${noun}s`} ${listed(here)}.`;
  return `${said[0].toUpperCase()}${said.slice(1)}: ${instead}`;
}

// What this fragment names and is not here; "" where all of it is.
function missingFrom(fragment) {
  const wanted = new URLSearchParams(fragment.slice(1));
  if (!wanted.has("step")) return "";
  const step = wanted.get("step"), group = wanted.get("group");
  const entry = island.steps.find(({ meta }) => String(meta.step) === step);
  if (!entry) {
    return sentence("step", step, "", island.steps.map(({ meta }) => meta.step), island.stored.map(String).includes(step));
  }
  const found = entry.meta.groups.find(({ index }) => String(index) === group);
  if (!found) {
    if (group == null) return "";
    return sentence("group", group, ` of step ${step}`, entry.meta.groups.map(({ index }) => index),
      entry.left_out.map(String).includes(group));
  }
  const [index, token] = (wanted.get("token") ?? "").split(".");
  const completion = found.completions.find((one) => String(one.index) === index);
  if (index && !completion) {
    return sentence("completion", index, ` of step ${step}, group ${group}`, found.completions.map((one) => one.index), false);
  }
  const length = index ? completion.stop - completion.start : 0;
  if (index && !(Number(token) < length)) {
    return `Completion ${index} of step ${step}, group ${group} has no token ${token}: it has ${plural(length, "token")}, counted from 0.`;
  }
  return "";
}

function sayMissing(text) {
  const box = $("xray-missing");
  box.hidden = !text;
  box.textContent = text;
}

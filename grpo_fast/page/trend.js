// The same prompt at other steps of this page: its mean reward as a line, and the way to each group.

const TREND = { width: 420, height: 64, edge: 6 };

// Groups of the same dataset row; where the log has no row, of the same prompt.
function samePrompt(view) {
  const same = ({ row, prompt }) => (view.group.row == null ? row == null && prompt === view.group.prompt
    : row === view.group.row);
  return island.steps.flatMap(({ meta }) => meta.groups.filter(same).map((group) => {
    const known = group.rewards.filter((r) => r != null);
    return {
      step: meta.step, group, count: group.advantages.length,
      winners: group.advantages.filter((a) => a > 0).length,
      mean: known.length ? known.reduce((a, b) => a + b, 0) / known.length : null,
    };
  }));
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function trendLine(points) {
  const { width, height, edge } = TREND;
  const means = points.map(({ mean }) => mean);
  const [low, high] = [Math.min(...means), Math.max(...means)];
  const [first, last] = [points[0].step, points[points.length - 1].step];
  const at = ({ step, mean }) => [
    edge + ((step - first) / Math.max(last - first, 1)) * (width - 2 * edge),
    high === low ? height / 2 : height - edge - ((mean - low) / (high - low)) * (height - 2 * edge),
  ].map((x) => x.toFixed(1));
  const dots = points.map((point) => {
    const [cx, cy] = at(point);
    return svg("circle", { cx, cy, r: point.here ? 5 : 3, "data-value": point.mean }, svg("title", {}, document.createTextNode(trendText(point))));
  });
  return svg("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", "data-testid": "trend-line",
    "aria-label": `mean reward of this prompt from ${short(means[0])} at step ${first} to ${short(means[means.length - 1])} at step ${last}`,
  }, svg("polyline", { points: points.map((point) => at(point).join(",")).join(" ") }), ...dots);
}

function trendText({ step, mean, winners, count }) {
  return `step ${step}: ${mean == null ? "not scored" : `mean reward ${short(mean)}`}, ${winners} of ${count} won`;
}

function drawTrend(view) {
  const points = samePrompt(view).map((point) => ({ ...point, here: point.group === view.group }));
  const links = points.map((point) => h("li", {}, h("a", {
    href: `#${new URLSearchParams({ step: point.step, group: point.group.index })}`,
    "data-testid": "trend-link", "aria-current": point.here ? "true" : null,
  }, trendText(point))));
  const scored = points.filter(({ mean }) => mean != null);
  const alone = points.length < 2;
  $("xray-trend").replaceChildren(
    h("p", { class: "soft" }, alone ? "No other step of this page has this prompt."
      : `This prompt is in ${points.length} groups of this page; its mean reward:`),
    alone || scored.length < 2 ? "" : trendLine(scored),
    alone ? "" : h("ol", {}, ...links),
  );
}

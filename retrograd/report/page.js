"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const articles = [...document.querySelectorAll("article[data-query]")];
  const links = [...document.querySelectorAll("nav a")];
  const config = { displayModeBar: false, responsive: true };
  const narrow = matchMedia("(max-width: 45rem)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let current = 0;

  document.documentElement.classList.add("scripted");

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const centred = (values) => { const middle = mean(values); return values.map((value) => value - middle); };
  const extent = (values) => {
    let low = Infinity, high = -Infinity;
    for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
    const room = 0.06 * (high - low) || 1;
    return [low - room, high + room];
  };

  function layout(xRange, yRange, xTitle, yTitle) {
    const axis = {
      gridcolor: colour("line"), zeroline: false, linecolor: colour("line"), tickfont: { size: 11 }, nticks: 6, fixedrange: true,
    };
    return {
      margin: { l: 46, r: 8, t: 8, b: 40 }, showlegend: false, hovermode: "closest", dragmode: false,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("quiet") },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
      xaxis: { ...axis, range: xRange, title: { text: xTitle, standoff: 6 } },
      yaxis: { ...axis, range: yRange, title: { text: yTitle, standoff: 4 } },
      shapes: [{
        type: "line", layer: "below", x0: -1e4, y0: -1e4, x1: 1e4, y1: 1e4, line: { color: colour("quiet"), width: 1, dash: "dot" },
      }],
    };
  }

  const hover = "%{text}<br>predicted %{x:.3f}<br>actual %{y:.3f}<extra></extra>";

  function points(x, y, text, customdata, size, opacity, paint) {
    return { type: "scatter", mode: "markers", x, y, text, customdata, hovertemplate: hover, marker: { size, opacity, color: paint } };
  }

  // All queries at once, each relative to its own mean: what is left is what the subsets changed.
  function drawOverall(plot) {
    const method = data.methods[Number(plot.dataset.method)];
    const x = [], y = [], text = [], query = [];
    data.queries.forEach((one, place) => {
      x.push(...centred(method.predicted[place]));
      y.push(...centred(data.actual[place]));
      for (const _ of data.actual[place]) { text.push(`query ${one.id}: ${one.label}, says ${one.says}`); query.push(place); }
    });
    const [own] = [centred(method.predicted[current])];
    const chosen = points(own, centred(data.actual[current]), own.map(() => `query ${data.queries[current].id}`),
      own.map(() => current), 6, 0.9, colour("said"));
    Plotly.react(plot, [points(x, y, text, query, 3.5, 0.35, colour("point")), chosen],
      layout(extent(x), extent(y), `predicted (${data.unit})`, `actual (${data.unit})`), config);
    if (!plot.dataset.listening) {
      plot.dataset.listening = "yes";
      plot.on("plotly_click", (event) => show(event.points[0].customdata, true));
    }
  }

  function highlight(plot) {
    const method = data.methods[Number(plot.dataset.method)];
    const own = centred(method.predicted[current]);
    Plotly.restyle(plot, {
      x: [own], y: [centred(data.actual[current])], text: [own.map(() => `query ${data.queries[current].id}`)],
      customdata: [own.map(() => current)],
    }, [1]);
  }

  function drawSingle() {
    const plot = articles[current].querySelector(".plot");
    const x = data.methods[0].predicted[current], y = data.actual[current];
    const both = extent([...x, ...y]);
    Plotly.react(plot, [points(x, y, x.map((_, subset) => `subset ${subset + 1}`), undefined, 6, 0.65, colour("point"))],
      layout(both, both, `predicted (${data.unit})`, `actual (${data.unit})`), config);
  }

  function drawAll() {
    document.querySelectorAll(".plot.overall").forEach(drawOverall);
    drawSingle();
  }

  // Shows one query. With `visit` the address changes too, so that the way back leads to the query before.
  function show(place, visit) {
    current = Math.min(Math.max(place, 0), articles.length - 1);
    articles.forEach((article, index) => { article.hidden = index !== current; });
    links.forEach((link, index) => {
      if (index === current) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    });
    const list = document.querySelector("nav"), box = links[current];
    if (narrow.matches) list.scrollLeft = box.offsetLeft - (list.clientWidth - box.offsetWidth) / 2;
    else if (list.scrollHeight > list.clientHeight) list.scrollTop = box.offsetTop - (list.clientHeight - box.offsetHeight) / 2;
    articles[current].querySelectorAll("[data-move]").forEach((button) => {
      const to = current + Number(button.dataset.move);
      button.disabled = to < 0 || to >= articles.length;
    });
    if (visit) history.pushState(null, "", `#${articles[current].id}`);
    drawSingle();
    document.querySelectorAll(".plot.overall").forEach(highlight);
  }

  function fromAddress() {
    return articles.findIndex((article) => `#${article.id}` === location.hash);
  }

  links.forEach((link, place) => link.addEventListener("click", (event) => {
    event.preventDefault();
    show(place, true);
  }));
  document.querySelectorAll("[data-move]").forEach((button) => button.addEventListener("click", () => {
    const step = Number(button.dataset.move);
    show(current + step, true);
    const same = articles[current].querySelector(`[data-move="${step}"]`);
    (same.disabled ? articles[current] : same).focus({ preventScroll: true });
  }));
  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || current + step < 0 || current + step >= articles.length) return;
    event.preventDefault();
    const listed = links.includes(document.activeElement);
    show(current + step, true);
    if (listed) links[current].focus();
  });
  addEventListener("popstate", () => show(Math.max(fromAddress(), 0), false));
  dark.addEventListener("change", drawAll);

  current = Math.max(fromAddress(), 0);
  drawAll();
  show(current, false);
})();

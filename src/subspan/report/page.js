"use strict";
(() => {
  const roles = ["ink", "muted", "line", "card", "first", "second", "third", "fourth"];
  // Cividis runs from dark blue to yellow and keeps its order in grey and for every kind of colour vision.
  const sequential = "Cividis";

  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    return Object.fromEntries(roles.map((role) => [role, style.getPropertyValue(`--${role}`).trim()]));
  };

  const faint = (colour) => {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    return `rgba(${r}, ${g}, ${b}, 0.14)`;
  };

  // Colours in the stored figures are roles; this puts the current theme's colours in their place.
  const coloured = (value, colours) => {
    if (Array.isArray(value)) return value.map((entry) => coloured(entry, colours));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, entry]) => {
        if ((key === "color" || key === "bgcolor") && entry in colours) return [key, colours[entry]];
        if (key === "fillcolor") return [key, faint(colours[entry.replace("-faint", "")])];
        if (key === "colorscale" && entry === "sequential") return [key, sequential];
        return [key, coloured(entry, colours)];
      }),
    );
  };

  const merged = (base, extra) => {
    const result = { ...base };
    for (const [key, value] of Object.entries(extra ?? {})) {
      const nested = value && typeof value === "object" && !Array.isArray(value) && base[key];
      result[key] = nested ? merged(base[key], value) : value;
    }
    return result;
  };

  // Of the numbered places on an axis those that have room beside the one before; names of rows are never left out.
  const thin = (axis, pixels, room) => {
    if (!axis.tickvals || !axis.range) return;
    const unit = pixels / Math.abs(axis.range[1] - axis.range[0]);
    let last = -Infinity;
    const kept = axis.tickvals.map((at, place) => {
      const free = (at - last) * unit >= room(axis.ticktext[place]);
      if (free) last = at;
      return free;
    });
    axis.ticktext = axis.ticktext.filter((_, place) => kept[place]);
    axis.tickvals = axis.tickvals.filter((_, place) => kept[place]);
  };

  const draw = (plot) => {
    const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    const colours = theme();
    const narrow = plot.clientWidth < 480;
    const axis = {
      gridcolor: colours.line,
      linecolor: colours.line,
      zerolinecolor: colours.line,
      automargin: true,
      title: { standoff: 8, font: { size: narrow ? 12 : 13 } },
      fixedrange: true,
    };
    const layout = merged(
      {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 12 : 13, color: colours.ink },
        margin: { l: narrow ? 48 : 60, r: 16, t: 12, b: 44 },
        xaxis: axis,
        yaxis: axis,
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", xanchor: "left" },
        hoverlabel: { bgcolor: colours.card, bordercolor: colours.line, font: { color: colours.ink } },
        separators: ".\u2009",
        width: plot.clientWidth,
      },
      coloured(figure.layout, colours),
    );
    thin(layout.xaxis, plot.clientWidth - 120, (text) => 8 * text.length + 6);
    thin(layout.yaxis, (layout.height ?? (narrow ? 300 : 360)) - 70, () => 15);
    if (layout.height) plot.style.height = `${narrow ? Math.round(layout.height * 0.8) : layout.height}px`;
    delete layout.height;
    if (narrow) for (const entry of layout.annotations ?? []) entry.font = { ...entry.font, size: 11 };
    return Plotly.react(plot, coloured(figure.data, colours), layout, { displayModeBar: false });
  };

  // The library of plots lies in the page compressed, at a third of its size.
  const unpacked = async () => {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };

  const plots = [...document.querySelectorAll(".plot")];
  const drawAll = () => Promise.all(plots.map(draw));
  const start = async () => {
    await unpacked();
    await drawAll();
    document.documentElement.setAttribute("data-drawn", String(plots.length));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    // A turned phone or another window size changes the type sizes too, so figures are drawn again, not only stretched.
    const resized = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        if (target.layout && target.clientWidth !== target.layout.width) draw(target);
      }
    });
    for (const plot of plots) resized.observe(plot);
  };
  start().catch((error) => {
    for (const plot of plots) plot.textContent = `The plot could not be drawn (${error.message}); ${plot.ariaLabel}`;
  });
})();

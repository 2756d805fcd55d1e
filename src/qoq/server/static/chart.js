// A small line chart over the last minutes, drawn on a canvas.

export const LENGTH = 120; // points, one a second

export class Chart {
  // series: [{name}]; format: a value's text; unit: after the big figure; max: fixed top; least: the
  // lowest top there may be.
  constructor({ title, series, format, unit = "", max = null, least = 0 }) {
    this.series = series;
    this.format = format;
    this.max = max;
    this.least = least;
    this.gutter = 0; // width of the labels at the left
    this.points = [];
    this.hover = null;
    this.element = make("section", "card");
    this.figure = make("span", "value");
    const head = make("div", "figure");
    head.append(this.figure, make("span", "unit", unit));
    this.canvas = make("canvas");
    this.canvas.setAttribute("role", "img");
    this.legend = make("div", "legend");
    this.names = series.map((each, i) => {
      const item = make("span", `series-${i}`);
      const words = make("span", "words");
      item.append(make("i"), words);
      this.legend.append(item);
      return { item, words };
    });
    this.element.append(make("h2", "", title), head, this.canvas, this.legend);
    this.title = title;
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
  }

  // values: one per series, null where there is nothing to tell.
  push(values) {
    this.points.push(values);
    if (this.points.length > LENGTH) this.points.shift();
    this.draw();
  }

  point(event) {
    if (event) {
      const share = (event.offsetX - this.gutter) / (this.canvas.clientWidth - this.gutter);
      this.hover = Math.round(share * (LENGTH - 1)) - (LENGTH - this.points.length);
      if (!(this.hover >= 0 && this.hover < this.points.length)) this.hover = null;
    } else this.hover = null;
    this.draw();
  }

  text(value) {
    return value === null || value === undefined ? "–" : this.format(value);
  }

  draw() {
    const latest = this.points.at(-1) ?? [];
    const shown = this.hover === null ? latest : (this.points[this.hover] ?? latest);
    this.figure.textContent = this.text(latest[0]);
    const ago = this.hover === null ? "" : `, ${this.points.length - 1 - this.hover} s ago`;
    this.series.forEach((each, i) => {
      this.names[i].words.textContent = `${each.name} ${this.text(shown[i])}${i ? "" : ago}`;
    });
    this.canvas.setAttribute("aria-label", `${this.title}: ${this.legend.textContent}`);
    this.paint();
  }

  paint() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width) return; // not on show
    const scale = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
    }
    const pen = this.canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const known = this.points.flat().filter(Number.isFinite);
    const top = this.max ?? round(Math.max(this.least, ...known));
    const [roof, floor] = [6, height - 6];
    const y = (value) => floor - (floor - roof) * Math.min(1, value / top);
    const style = getComputedStyle(this.legend);
    pen.font = `11px ${style.fontFamily}`;
    pen.lineWidth = 1;
    const labels = [0, 0.5, 1].map((share) => (known.length ? short(this.format(share * top)) : ""));
    this.gutter = known.length ? Math.ceil(Math.max(...labels.map((text) => pen.measureText(text).width))) + 8 : 0;
    const left = this.gutter;
    const x = (index) => left + ((width - left) * (index + LENGTH - this.points.length)) / (LENGTH - 1);
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const [i, share] of [0, 0.5, 1].entries()) {
      const line = Math.round(y(share * top)) + 0.5;
      pen.globalAlpha = 0.25;
      pen.strokeStyle = style.color;
      pen.beginPath();
      pen.moveTo(left, line);
      pen.lineTo(width, line);
      pen.stroke();
      pen.globalAlpha = 0.9;
      pen.fillStyle = style.color;
      pen.fillText(labels[i], left - 8, line);
    }
    pen.globalAlpha = 1;
    if (!known.length) {
      pen.textAlign = "center";
      pen.fillText("nothing to show yet", width / 2, (roof + y(top / 2)) / 2);
      return;
    }
    this.series.forEach((each, i) => this.line(pen, i, x, y, floor));
    if (this.hover !== null) {
      pen.strokeStyle = style.color;
      pen.beginPath();
      pen.moveTo(x(this.hover), roof);
      pen.lineTo(x(this.hover), floor);
      pen.stroke();
    }
  }

  // One series, broken where values are missing; alone it is filled down to the floor.
  line(pen, index, x, y, floor) {
    pen.strokeStyle = pen.fillStyle = getComputedStyle(this.names[index].item).color;
    pen.lineWidth = 1.8;
    pen.lineJoin = "round";
    let run = [];
    const flush = () => {
      if (run.length) {
        pen.beginPath();
        run.forEach(([px, py], i) => (i ? pen.lineTo(px, py) : pen.moveTo(px, py)));
        if (run.length === 1) pen.lineTo(run[0][0] - 1, run[0][1]);
        pen.stroke();
        if (index === 0) {
          pen.lineTo(run.at(-1)[0], floor);
          pen.lineTo(run[0][0], floor);
          pen.globalAlpha = 0.1;
          pen.fill();
          pen.globalAlpha = 1;
        }
      }
      run = [];
    };
    this.points.forEach((values, i) => {
      if (Number.isFinite(values[index])) run.push([x(i), y(values[index])]);
      else flush();
    });
    flush();
  }
}

// The next of 1, 2, 4, 6, 8, 10, 20, ... at or above a value, so that halves are plain too.
function round(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].find((step) => step * power >= value) * power;
}

// A label without zeros after its point.
const short = (text) => text.replace(/\.0+(?=\D|$)/, "");

export function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
}

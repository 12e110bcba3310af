// The page: what is typed is embedded by both models, and what is nearest to it is shown.
import init, { Backend, Search } from './pkg/burn_moe_browser.js';

const HITS = 12;
const MODELS = ['dense', 'sparse'];
// A function that uses a vector: valid where WebAssembly has SIMD.
const SIMD = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11]);

const element = (id) => document.getElementById(id);
const say = (text) => { element('message').textContent = text; };

const searches = {};
let emoji = null;
const own = [];

async function file(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: the server answers ${response.status}`);
  return response;
}
const bytes = async (path) => new Uint8Array(await (await file(path)).arrayBuffer());
const text = async (path) => (await file(path)).text();

/// The device that the address asks for, or the best there is; and what to call it.
async function chosen() {
  const wanted = new URLSearchParams(location.search).get('device') ?? 'auto';
  element('device').value = ['webgpu', 'flex'].includes(wanted) ? wanted : 'auto';
  const processor = (why) => ({ backend: Backend.flex(), name: `WebAssembly with SIMD${why}` });
  if (wanted === 'flex') return processor('');
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (!adapter) return processor(navigator.gpu ? ': this browser has WebGPU, but no GPU for it' : ': this browser has no WebGPU');
  const { vendor = '', architecture = '', description = '', isFallbackAdapter } = adapter.info ?? {};
  const is_software = isFallbackAdapter || adapter.isFallbackAdapter || /swiftshader|llvmpipe/i.test(`${architecture} ${description}`);
  if (is_software && wanted === 'auto') return processor(': WebGPU is there, but computed by the processor');
  try {
    return { backend: await Backend.webgpu(), name: `WebGPU (${[vendor, architecture, description].filter(Boolean).join(', ') || 'unnamed'})` };
  } catch (error) {
    return processor(`: WebGPU failed (${error.message})`);
  }
}

async function load() {
  if (typeof WebAssembly !== 'object') throw new Error('this browser has no WebAssembly, or it is turned off: a newer browser has it');
  if (!WebAssembly.validate(SIMD)) throw new Error('this browser has WebAssembly without SIMD, which this page needs: a newer browser has it');
  const data = MODELS.map((name) => Promise.all([
    text(`${name}/burn_moe_config.json`),
    bytes(`${name}/burn_moe_model.safetensors`),
    bytes(`${name}/emoji.f32`),
  ]));
  emoji = JSON.parse(await text('emoji.json'));
  await init();
  const { backend, name } = await chosen();
  for (const [place, model] of MODELS.entries()) {
    const [config, weights, pictures] = await data[place];
    searches[model] = new Search(backend, config, weights);
    searches[model].add(new Float32Array(pictures.buffer));
    // The first pass compiles what the GPU computes.
    await searches[model].texts(['warm up']);
  }
  element('backend').textContent = name;
  for (const id of ['query', 'files', 'device']) element(id).disabled = false;
  say('');
  // For the test, and for the console.
  globalThis.burnMoe = { backend, name, searches, Search, emoji };
  await update();
  document.body.dataset.ready = name;
}

function hit(place, score) {
  const item = document.createElement('li');
  let picture, name;
  if (place < emoji.names.length) {
    name = emoji.names[place];
    picture = document.createElement('span');
    picture.setAttribute('role', 'img');
    // Shown at twice the size.
    const side = 2 * emoji.side;
    picture.style.backgroundSize = `${side * emoji.columns}px auto`;
    picture.style.backgroundPosition = `${-(place % emoji.columns) * side}px ${-Math.floor(place / emoji.columns) * side}px`;
    picture.setAttribute('aria-label', name);
  } else {
    const mine = own[place - emoji.names.length];
    name = mine.name;
    picture = document.createElement('img');
    picture.src = mine.url;
    picture.alt = name;
    picture.style.backgroundImage = 'none';
  }
  picture.className = 'tile';
  const about = document.createElement('span');
  about.textContent = name;
  const number = document.createElement('span');
  number.className = 'score';
  number.textContent = score.toFixed(3);
  item.dataset.place = place;
  item.append(picture, about, number);
  return item;
}

async function show(query) {
  for (const model of MODELS) {
    const search = searches[model];
    const start = performance.now();
    const found = search.nearest(await search.texts([query]), HITS);
    const took = performance.now() - start;
    element(`${model}-time`).textContent = `${took < 10 ? took.toFixed(1) : took.toFixed(0)} ms`;
    const items = [];
    for (let i = 0; i < found.length; i += 2) items.push(hit(found[i], found[i + 1]));
    element(`${model}-hits`).replaceChildren(...items);
  }
  experts(JSON.parse(await searches.sparse.routes(query)));
}

/// A row for each word, a column for each sparse block.
function experts({ words, blocks }) {
  const cell = (kind, ...content) => {
    const made = document.createElement(kind);
    made.append(...content);
    return made;
  };
  const row = (...cells) => cell('tr', ...cells);
  const chip = (expert) => {
    const made = cell('span', String(expert));
    made.className = 'expert';
    made.style.setProperty('--expert', expert);
    return made;
  };
  const head = row(cell('th', 'word'), ...blocks.map((_, block) => cell('th', `block ${block}`)));
  const name = (word, place) => (place === 0 ? '(start)' : place === words.length - 1 ? '(end)' : word);
  const rows = words.map(({ word, experts }, place) => row(cell('th', name(word, place)), ...experts.map((of) => cell('td', ...of.map(chip)))));
  const percent = (share) => `${Math.round(100 * share)} %`;
  const average = blocks.map(({ confidence, entropy }) => cell('td', `highest probability ${percent(confidence)}, entropy ${entropy.toFixed(2)} nats`));
  element('experts').replaceChildren(cell('thead', head), cell('tbody', ...rows, row(cell('th', '(mean)'), ...average)));
}

let running = false;
let again = false;
/// Shows what is typed; what is typed meanwhile is next, and what is outdated is left out.
async function update() {
  if (running) {
    again = true;
    return;
  }
  running = true;
  try {
    do {
      again = false;
      const query = element('query').value;
      await show(query);
      document.body.dataset.shown = query;
    } while (again);
  } finally {
    running = false;
  }
}

/// An image of a kind that the library does not read, as one that it does.
async function asPng(image) {
  const bitmap = await createImageBitmap(image);
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  canvas.getContext('2d').drawImage(bitmap, 0, 0);
  const png = await new Promise((resolve) => canvas.toBlob(resolve, 'image/png'));
  return new Uint8Array(await png.arrayBuffer());
}

async function add(files) {
  const failed = [];
  for (const image of files) {
    say(`Reading ${image.name} …`);
    try {
      const original = new Uint8Array(await image.arrayBuffer());
      const embed = async (content) => {
        const embeddings = [];
        for (const model of MODELS) embeddings.push(await searches[model].picture(content));
        return embeddings;
      };
      const embeddings = await embed(original).catch(async (error) => {
        const png = await asPng(image).catch(() => { throw error; });
        return embed(png);
      });
      MODELS.forEach((model, place) => searches[model].add(embeddings[place]));
      own.push({ name: image.name, url: URL.createObjectURL(image) });
      const item = document.createElement('li');
      item.textContent = image.name;
      element('own').append(item);
    } catch (error) {
      failed.push(`${image.name}: ${error.message ?? error}`);
    }
  }
  say(failed.join('; '));
  element('clear').hidden = own.length === 0;
  await update();
  document.body.dataset.own = own.length;
}

function clear() {
  for (const model of MODELS) searches[model].keep(emoji.names.length);
  own.splice(0).forEach(({ url }) => URL.revokeObjectURL(url));
  element('own').replaceChildren();
  element('clear').hidden = true;
  element('files').value = '';
  update();
}

const fail = (error) => say(`This page cannot go on: ${error.message ?? error}`);
const guarded = (action) => (...input) => Promise.resolve(action(...input)).catch(fail);

element('form').addEventListener('submit', (event) => event.preventDefault());
element('query').addEventListener('input', guarded(update));
element('device').addEventListener('change', () => { location.search = `?device=${element('device').value}`; });
element('files').addEventListener('change', guarded(() => add([...element('files').files])));
element('clear').addEventListener('click', clear);
for (const kind of ['dragover', 'drop', 'dragleave']) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle('dragging', kind === 'dragover');
    if (kind === 'drop' && searches.sparse) guarded(add)([...event.dataTransfer.files]);
  });
}
guarded(load)();

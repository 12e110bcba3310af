// The page in headless Chromium, with WebGPU on its software adapter and without WebGPU: embeddings, rankings, routing statistics and dropped pictures
// are those of the native library, as `browser_data` wrote them down.
//
//   examples/browser/build.sh && examples/browser/test.sh
//
// `test.sh wasm` and `test.sh webgpu` run one of the two. CHROMIUM names another browser; GPU=1 takes the machine's own adapter for WebGPU.
const assert = require('assert');
const fs = require('fs');
const http = require('http');
const path = require('path');
const puppeteer = require('puppeteer-core');

const ROOT = path.join(__dirname, '../../target/browser');
const TEST = path.join(ROOT, 'test');
const expected = JSON.parse(fs.readFileSync(path.join(TEST, 'expected.json')));
const TOLERANCE = 1e-4;
const TYPES = { '.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css', '.wasm': 'application/wasm', '.json': 'application/json', '.png': 'image/png' };

async function serve() {
  const server = http.createServer((request, response) => {
    const name = path.normalize(new URL(request.url, 'http://localhost').pathname).replace(/\/$/, '/index.html');
    fs.readFile(path.join(ROOT, 'page', name), (error, content) => {
      if (error) return response.writeHead(404).end();
      response.writeHead(200, { 'content-type': TYPES[path.extname(name)] ?? 'application/octet-stream' }).end(content);
    });
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  return server;
}

function difference(found, wanted, what) {
  assert.strictEqual(found.length, wanted.length, what);
  const largest = found.reduce((most, value, i) => Math.max(most, Math.abs(value - wanted[i])), 0);
  assert(largest <= TOLERANCE, `${what}: differs by ${largest}`);
  return largest;
}

/// What the page's functions return, of both models, for all queries and pictures.
async function numbers(page, model) {
  const files = expected.files.map((name) => fs.readFileSync(path.join(TEST, name)).toString('base64'));
  return page.evaluate(async (model, queries, files, limited) => {
    const { searches, Search, backend } = globalThis.burnMoe;
    const search = searches[model];
    const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const [texts, pictures, routings, times, few, fewRoutings] = [[], [], [], [], [], []];
    for (const query of queries) texts.push(Array.from(await search.texts([query])));
    for (const file of files) pictures.push(Array.from(await search.picture(bytes(file))));
    for (const query of queries) routings.push(JSON.parse(await search.routes(query)).blocks);
    const together = Array.from(await search.texts(queries));
    for (let round = 0; round < 2; round++) {
      for (const query of queries) {
        const start = performance.now();
        search.nearest(await search.texts([query]), 12);
        times.push(performance.now() - start);
      }
    }
    if (model === 'sparse') {
      const weights = new Uint8Array(await (await fetch('sparse/burn_moe_model.safetensors')).arrayBuffer());
      const search = new Search(backend, limited, weights);
      for (const query of queries) few.push(Array.from(await search.texts([query])));
      for (const query of queries) fewRoutings.push(JSON.parse(await search.routes(query)).blocks);
    }
    times.sort((a, b) => a - b);
    return { texts, together, pictures, routings, few, fewRoutings, milliseconds: times[times.length >> 1] };
  }, model, expected.queries, files, expected.limited.config);
}

function compareRoutings(found, wanted, what) {
  let dropped = 0;
  found.forEach((blocks, query) => {
    assert.strictEqual(blocks.length, wanted[query].length, what);
    blocks.forEach((block, place) => {
      const other = wanted[query][place];
      block.load.forEach((share, expert) => assert(Math.abs(share - other.load[expert]) < 1e-9, `${what}: load of query ${query}`));
      for (const key of ['confidence', 'entropy', 'dropped']) assert(Math.abs(block[key] - other[key]) < TOLERANCE, `${what}: ${key} of query ${query}`);
      dropped += block.dropped;
    });
  });
  return dropped;
}

async function compare(page, model) {
  const wanted = expected[model];
  const found = await numbers(page, model);
  const texts = found.texts.map((text, i) => difference(text, wanted.texts[i], `${model}, query ${i}`));
  texts.push(difference(found.together, wanted.texts.flat(), `${model}, all queries in one batch`));
  const pictures = found.pictures.map((picture, i) => difference(picture, wanted.pictures[i], `${model}, ${expected.files[i]}`));
  compareRoutings(found.routings, wanted.routings, model);
  if (model === 'sparse') {
    texts.push(...found.few.map((text, i) => difference(text, expected.limited.texts[i], `limited capacity, query ${i}`)));
    assert(compareRoutings(found.fewRoutings, expected.limited.routings, 'limited capacity') > 0, 'a limited capacity drops choices');
  }
  return { texts: Math.max(...texts), pictures: Math.max(...pictures), milliseconds: found.milliseconds };
}

async function type(page, query) {
  await page.focus('#query');
  await page.keyboard.down('Control');
  await page.keyboard.press('a');
  await page.keyboard.up('Control');
  await page.keyboard.type(query);
  await page.waitForFunction((query) => document.body.dataset.shown === query, { timeout: 120000 }, query);
}

const hits = (page, model) => page.$$eval(`#${model}-hits li`, (items) => items.map((item) => Number(item.dataset.place)));

/// The number of places where two pictures stand the other way round whose similarities are the same to rounding.
function sameRanking(found, wanted, what) {
  assert.strictEqual(found.length, 12, what);
  const similarity = new Map(wanted);
  return found.filter((picture, place) => {
    if (picture === wanted[place][0]) return false;
    const apart = Math.abs((similarity.get(picture) ?? 2) - wanted[place][1]);
    assert(apart < 1e-6, `${what}: place ${place} is picture ${picture} and not ${wanted[place][0]}, whose similarities differ by ${apart}`);
    return true;
  }).length;
}

/// Whoever has no mouse reaches everything.
async function tabTo(page, id) {
  for (let i = 0; i < 30; i++) {
    if (await page.evaluate(() => document.activeElement?.id) === id) return;
    await page.keyboard.press('Tab');
  }
  throw new Error(`the keyboard does not reach #${id}`);
}

async function check(name, flags, query, isExpected) {
  const say = (what) => console.log(`${name}: ${what}`);
  const server = await serve();
  const origin = `http://127.0.0.1:${server.address().port}`;
  const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM || '/usr/bin/chromium', args: ['--no-sandbox', ...flags], protocolTimeout: 600000 });
  try {
    const page = await browser.newPage();
    const errors = [];
    page.on('pageerror', (error) => errors.push(error.message));
    page.on('console', (message) => message.type() === 'error' && errors.push(message.text()));
    page.on('request', (request) => {
      const url = request.url();
      if (!url.startsWith(origin) && !/^(blob|data):/.test(url)) errors.push(`a request to ${url}`);
    });
    await page.setViewport({ width: 1000, height: 1100 });
    await page.goto(`${origin}/${query}`);
    await page.waitForFunction(() => document.body.dataset.ready || document.getElementById('message').textContent.startsWith('This page cannot'), { timeout: 300000 })
      .catch(async () => { throw new Error(`the page is not ready: ${await page.$eval('#message', (m) => m.textContent)} ${errors.join('; ')}`); });
    const backend = await page.evaluate(() => document.body.dataset.ready ?? document.getElementById('message').textContent);
    assert(isExpected(backend), `${name}: the page says "${backend}" ${errors.join('; ')}`);

    say(`the page is ready: ${backend}`);
    const figures = { name, backend, dense: await compare(page, 'dense'), sparse: await compare(page, 'sparse') };

    for (const model of ['dense', 'sparse']) {
      const { texts, pictures, milliseconds } = figures[model];
      const native = expected[model].milliseconds.toFixed(2);
      say(`${model}: texts within ${texts.toExponential(1)}, pictures within ${pictures.toExponential(1)}; ${milliseconds.toFixed(2)} ms per query, natively ${native}`);
    }
    figures.ties = 0;
    for (const [place, text] of expected.queries.entries()) {
      await tabTo(page, 'query');
      await type(page, text);
      for (const model of ['dense', 'sparse']) figures.ties += sameRanking(await hits(page, model), expected[model].nearest[place], `${name}, ${model}, "${text}"`);
    }
    const rows = await page.$$eval('#experts tbody tr', (rows) => rows.map((row) => row.querySelectorAll('.expert').length));
    assert(rows.length > 3 && rows.slice(0, -1).every((experts) => experts >= 2), `experts of each word: ${rows}`);

    say(`the rankings are the same, but for ${figures.ties} places of equal similarities`);
    // One picture chosen, two dropped.
    const input = await page.$('#files');
    await input.uploadFile(path.join(TEST, expected.files[1]));
    await page.waitForFunction(() => document.body.dataset.own === '1', { timeout: 120000 });
    const dropped = [5, 6].map((i) => [expected.files[i], fs.readFileSync(path.join(TEST, expected.files[i])).toString('base64')]);
    await page.evaluate((files) => {
      const dataTransfer = new DataTransfer();
      for (const [name, base64] of files) dataTransfer.items.add(new File([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], name));
      document.body.dispatchEvent(new DragEvent('drop', { dataTransfer, bubbles: true, cancelable: true }));
    }, dropped);
    await page.waitForFunction(() => document.body.dataset.own === '3', { timeout: 120000 });
    for (const model of ['dense', 'sparse']) {
      for (const [own, i] of [1, 5, 6].entries()) {
        const [place, score] = await page.evaluate((model, picture) => Array.from(globalThis.burnMoe.searches[model].nearest(new Float32Array(picture), 1)), model, expected[model].pictures[i]);
        assert(place === 1652 + own && score > 0.9999, `${name}, ${model}: dropped picture ${i} is found as ${place}, ${score}`);
      }
    }
    await type(page, 'rotes herz');
    await page.screenshot({ path: path.join(TEST, `${name}.png`) });
    await tabTo(page, 'clear');
    await page.keyboard.press('Enter');
    await page.waitForFunction(() => document.querySelectorAll('#own li').length === 0, { timeout: 120000 });

    say('pictures were dropped and found');
    await page.setViewport({ width: 360, height: 740 });
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    assert(width <= 360, `${width} pixels on a phone of 360`);
    await page.screenshot({ path: path.join(TEST, `${name}-phone.png`) });
    assert.deepStrictEqual(errors, [], name);

    const bare = await browser.newPage();
    await bare.evaluateOnNewDocument(() => { delete globalThis.WebAssembly; });
    await bare.goto(`${origin}/`);
    await bare.waitForFunction(() => document.getElementById('message').textContent.includes('no WebAssembly'), { timeout: 60000 });
    return figures;
  } finally {
    await browser.close();
    server.close();
  }
}

async function main() {
  const software = ['--use-webgpu-adapter=swiftshader', '--use-vulkan=swiftshader'];
  const gpu = ['--enable-unsafe-webgpu', '--enable-features=Vulkan', ...(process.env.GPU ? [] : software)];
  const checks = {
    wasm: () => check('wasm', ['--disable-features=WebGPU', '--disable-gpu'], '', (backend) => backend.startsWith('WebAssembly with SIMD')),
    webgpu: () => check('webgpu', gpu, '?device=webgpu', (backend) => backend.startsWith('WebGPU (')),
  };
  const results = [];
  for (const name of process.argv.length > 2 ? process.argv.slice(2) : Object.keys(checks)) results.push(await checks[name]());
  fs.writeFileSync(path.join(TEST, 'results.json'), JSON.stringify(results, null, 2));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});

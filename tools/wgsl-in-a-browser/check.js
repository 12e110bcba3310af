// Whether a browser's WebGPU takes the kernels: native drivers are more lenient (barriers in control flow that is not uniform, say).
//
//   CUBECL_DEBUG_LOG=/tmp/kernels.log cargo test --release --features wgpu,fusion --test gpu
//   apt-get install chromium && npm install --prefix /tmp puppeteer-core
//   NODE_PATH=/tmp/node_modules node tools/wgsl-in-a-browser/check.js /tmp/kernels.log
//
// Compiles every kernel of this crate in the log in Chromium, on its software adapter, and prints what it says against it. That adapter has no
// f16: those kernels are counted and left out. burn's own kernels are not looked at: for a browser burn compiles them without 64-bit integers.
const fs = require('fs');
const http = require('http');
const puppeteer = require('puppeteer-core');

function kernels(log) {
  const found = new Map();
  for (const part of log.split('[START_KERNEL_COMPILATION]')) {
    const name = part.match(/name: (burn_moe\S+)/);
    const source = part.match(/```wgsl\n([\s\S]*?)```/);
    if (name && source) found.set(source[1], name[1]);
  }
  return found;
}

async function compile(source) {
  const module = device.createShaderModule({ code: source });
  const info = await module.getCompilationInfo();
  const messages = info.messages.filter((message) => message.type !== 'info').map((m) => `${m.type}, line ${m.lineNum}: ${m.message}`);
  if (messages.length === 0) {
    await device.createComputePipelineAsync({ layout: 'auto', compute: { module } }).catch((error) => messages.push(error.message));
  }
  return messages;
}

async function main() {
  const server = http.createServer((_, response) => response.setHeader('content-type', 'text/html').end('<html></html>')).listen(0);
  const flags = ['--no-sandbox', '--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan', '--use-vulkan=swiftshader'];
  const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM || '/usr/bin/chromium', args: flags });
  const page = await browser.newPage();
  await page.goto(`http://localhost:${server.address().port}/`);
  await page.evaluate(async () => {
    const adapter = await navigator.gpu.requestAdapter();
    window.device = await adapter.requestDevice({ requiredFeatures: [...adapter.features] });
  });
  let [checked, refused, half] = [0, 0, 0];
  for (const [source, name] of kernels(fs.readFileSync(process.argv[2], 'utf8'))) {
    if (source.includes('enable f16')) {
      half += 1;
      continue;
    }
    const messages = await page.evaluate(`(${compile})(${JSON.stringify(source)})`);
    checked += 1;
    if (messages.length > 0) {
      refused += 1;
      console.log(`${name}\n  ${messages.join('\n  ')}`);
    }
  }
  console.log(`${checked} kernels, ${refused} refused; ${half} of f16 left out`);
  await browser.close();
  server.close();
  process.exitCode = checked > 0 && refused === 0 ? 0 : 1;
}

main();

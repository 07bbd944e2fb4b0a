// A gRPC client of Node's, as a process: `node caller.js TARGET [OPTION=NUMBER ...]`. Orders and answers are caller.py's.

'use strict';

const grpc = require('@grpc/grpc-js');
const readline = require('node:readline');

require('@grpc/grpc-js-xds').register();

const [, , target, ...rest] = process.argv;
const options = {};
for (const each of rest) {
  const [name, number] = each.split('=');
  options[name] = Number(number);
}
const client = new grpc.Client(target, grpc.credentials.createInsecure(), options);
const asIs = (value) => value;
let counts = {};
let stopped = false;
let places = [];

function one() {
  return new Promise((resolve) => {
    const deadline = Date.now() + 20000;
    client.makeUnaryRequest('/test.Greeter/Name', asIs, asIs, Buffer.alloc(0), new grpc.Metadata(), { deadline }, (error, answer) => {
      const served = error ? `${grpc.status[error.code]}: ${error.details}` : answer.toString();
      counts[served] = (counts[served] || 0) + 1;
      resolve();
    });
  });
}

async function several(number) {
  for (let made = 0; made < number; made += 1) {
    await one();
  }
}

async function goOn() {
  while (!stopped) {
    await one();
  }
}

async function obey(line) {
  const [order, number] = line.trim().split(' ');
  if (order === 'calls') {
    await several(Number(number));
  } else if (order === 'start') {
    stopped = false;
    places = Array.from({ length: Number(number) }, goOn);
    console.log('{}');
    return;
  } else {
    stopped = true;
    await Promise.all(places);
  }
  console.log(JSON.stringify(counts));
  counts = {};
}

let before = Promise.resolve();
readline.createInterface({ input: process.stdin })
  .on('line', (line) => { before = before.then(() => obey(line)); })
  .on('close', () => { before.then(() => process.exit(0)); });

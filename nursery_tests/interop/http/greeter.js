// gRPC of Node, @grpc/grpc-js: an instance with the calls of greeter.py, or a client that makes one of each kind.
//
// node greeter.js serve ADDRESS PORT NAME
// node greeter.js call ADDRESS PORT

'use strict';

const grpc = require('@grpc/grpc-js');

const DETAILS = Buffer.from('08051203776879', 'hex');
const asIs = (value) => value;
const [, , mode, address, port, name] = process.argv;

function method(call, requestStream, responseStream) {
  return {
    path: `/test.Greeter/${call}`,
    requestStream,
    responseStream,
    requestSerialize: asIs,
    requestDeserialize: asIs,
    responseSerialize: asIs,
    responseDeserialize: asIs,
  };
}

let left = 0;
const waiting = [];
const begun = new Set();

function leave() {
  const told = waiting.shift();
  if (told) told(null, Buffer.from('yes'));
  else left++;
}

const handlers = {
  Name(call, answer) {
    const trailer = new grpc.Metadata();
    trailer.set('served-by', name);
    answer(null, Buffer.from(name), trailer);
  },
  Echo(call, answer) {
    const head = new grpc.Metadata();
    head.set('x-back', String(call.metadata.get('x-there')[0] || ''));
    call.sendMetadata(head);
    answer(null, call.request);
  },
  Count(call) {
    const end = Number(call.request.toString());
    let number = 0;
    const write = () => {
      while (number < end && !call.cancelled) {
        if (!call.write(Buffer.from(String(number++)))) {
          call.once('drain', write);
          return;
        }
      }
      call.end();
    };
    write();
  },
  Total(call, answer) {
    let size = 0;
    call.on('data', (message) => { size += message.length; });
    call.on('end', () => answer(null, Buffer.from(String(size))));
  },
  Chat(call) {
    call.on('data', (message) => call.write(Buffer.concat([message, Buffer.from('!')])));
    call.on('end', () => call.end());
  },
  Fail(call, answer) {
    const trailer = new grpc.Metadata();
    trailer.set('grpc-status-details-bin', DETAILS);
    trailer.set('why', 'so');
    answer({ code: grpc.status.ABORTED, details: 'höchst 100% ärgerlich\n', metadata: trailer });
  },
  Wait(call) {
    begun.add(call.request.toString());
    call.on('cancelled', leave);
  },
  Began(call, answer) {
    answer(null, Buffer.from(begun.has(call.request.toString()) ? 'yes' : 'no'));
  },
  Left(call, answer) {
    if (left > 0) {
      left--;
      answer(null, Buffer.from('yes'));
    } else {
      waiting.push(answer);
    }
  },
};

function serve() {
  const server = new grpc.Server({ 'grpc.max_receive_message_length': -1 });
  const streams = { Count: [false, true], Total: [true, false], Chat: [true, true] };
  const service = {};
  for (const call of Object.keys(handlers)) {
    service[call] = method(call, ...(streams[call] || [false, false]));
  }
  server.addService(service, handlers);
  server.bindAsync(`${address}:${port}`, grpc.ServerCredentials.createInsecure(), (error) => {
    if (error) throw error;
  });
  process.on('SIGTERM', () => server.tryShutdown(() => process.exit(0)));
}

// What a call came to: messages, and the status.
function outcome(call) {
  return new Promise((resolve) => {
    const messages = [];
    let head = {};
    call.on('data', (message) => messages.push(message.toString()));
    call.on('metadata', (metadata) => { head = metadata.getMap(); });
    call.on('error', () => {});
    call.on('status', (status) => {
      resolve({ messages, head, code: status.code, details: status.details, trailer: status.metadata.getMap() });
    });
  });
}

async function call() {
  const client = new grpc.Client(`${address}:${port}`, grpc.credentials.createInsecure(), {
    'grpc.max_receive_message_length': -1,
  });
  const limit = () => ({ deadline: Date.now() + 30000 });
  const open = (made, options = limit(), metadata = new grpc.Metadata()) =>
    client.makeBidiStreamRequest(`/test.Greeter/${made}`, asIs, asIs, metadata, options);
  const say = (made, messages, ...rest) => {
    const stream = open(made, ...rest);
    const found = outcome(stream);
    for (const message of messages) stream.write(Buffer.from(message));
    stream.end();
    return found;
  };
  const metadata = new grpc.Metadata();
  metadata.set('x-there', 'and back');
  const told = {};
  told.echo = await say('Echo', ['hi'], limit(), metadata);
  told.count = await say('Count', ['5']);
  told.total = await say('Total', ['ab', 'c']);
  told.chat = await say('Chat', ['a', 'b']);
  told.fail = await say('Fail', ['']);
  const large = await say('Echo', ['x'.repeat(4 << 20)]);
  told.large = [large.code, large.messages.length === 1 && large.messages[0].length];
  told.late = (await say('Wait', [''], { deadline: Date.now() + 200 })).code;
  told.leftLate = (await say('Left', [''])).messages;
  const waits = open('Wait');
  const cancelled = outcome(waits);
  waits.write(Buffer.from(''));
  waits.end();
  await say('Echo', ['first']);
  waits.cancel();
  told.cancelled = (await cancelled).code;
  told.leftCancelled = (await say('Left', [''])).messages;
  const many = await Promise.all(Array.from({ length: 300 }, (_, number) => say('Echo', [String(number)])));
  told.many = many.filter((each, number) => each.code === 0 && each.messages[0] === String(number)).length;
  console.log(JSON.stringify(told));
  client.close();
}

if (mode === 'serve') serve();
else call();

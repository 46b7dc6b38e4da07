// Sends standard input through SOCKS5 with Nodemailer, several messages over its pool:
//   node nodemailer_send.js PROXY-HOST PROXY-PORT USER PASSWORD RECEIVER-HOST RECEIVER-PORT NAME COUNT
// Prints the reply to each final dot, and "again" for each connection that it gave up.
const nodemailer = require('nodemailer');
const { readFileSync } = require('node:fs');

const [proxyHost, proxyPort, user, password, host, port, name, count] = process.argv.slice(2);
const transport = nodemailer.createTransport({
    host, port: Number(port), name, pool: true, maxConnections: 1, tls: { rejectUnauthorized: false },
    greetingTimeout: 3000, proxy: `socks5://${user}:${password}@${proxyHost}:${proxyPort}`,
});
transport.set('proxy_socks_module', require('socks'));

(async () => {
    const raw = readFileSync(0);
    for (let number = 0; number < Number(count); number++) {
        const envelope = { from: 'from@example.com', to: ['to@example.net'] };
        // As an MTA would: what failed for want of a greeting is tried again. Its SOCKS library loses a greeting that it
        // reads together with the reply to CONNECT, which a busy process may do.
        for (let attempt = 1; ; attempt++) {
            try {
                console.log((await transport.sendMail({ envelope, raw })).response);
                break;
            } catch (error) {
                if (attempt === 5 || !/Greeting never received/.test(error.message)) throw error;
                console.log('again');
            }
        }
    }
    transport.close();
})().catch((error) => { console.error(error.message); process.exitCode = 1; });

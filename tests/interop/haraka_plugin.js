// Haraka's plugin of test_haraka.py: takes mail for anybody and sends it to the address in the recipient's domain.
'use strict'

const { SOURCE, HELO } = process.env

exports.hook_rcpt = (next, connection) => {
    connection.relaying = true
    next(OK)
}

// d-192-0-2-1.example is the MX at 192.0.2.1.
exports.hook_get_mx = (next, hmail, domain) => {
    const exchange = domain.split('.')[0].split('-').slice(1).join('.')
    next(OK, { priority: 0, exchange, port: 25, bind: SOURCE, bind_helo: HELO })
}

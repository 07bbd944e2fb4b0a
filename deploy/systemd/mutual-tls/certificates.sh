#!/bin/sh
# Certificates for mutual TLS between machines, by openssl alone.
#
#   certificates.sh authority FOLDER               makes the authority: ca.pem, and ca.key, which stays where it is
#   certificates.sh issue FOLDER NAME IDENTITY     makes NAME.pem and NAME.key, which prove IDENTITY, for 30 days
#
# IDENTITY is a SPIFFE ID such as spiffe://example/machine/n1/b. A machine gets ca.pem and its own two files.
set -eu

usage() {
    echo "usage: $0 authority FOLDER | $0 issue FOLDER NAME IDENTITY" >&2
    exit 2
}

[ $# -ge 2 ] || usage
what=$1 folder=$2
umask 077
case $what in
authority)
    [ $# -eq 2 ] || usage
    mkdir -p "$folder"
    if [ -e "$folder/ca.key" ]; then
        echo "$folder/ca.key is there already" >&2
        exit 1
    fi
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj /CN=meshlocal \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout "$folder/ca.key" -out "$folder/ca.pem"
    ;;
issue)
    [ $# -eq 4 ] || usage
    name=$3 identity=$4
    case $identity in
    spiffe://*/*) ;;
    *)
        echo "$identity is no SPIFFE ID" >&2
        exit 2
        ;;
    esac
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$name" \
        -keyout "$folder/$name.key.new" -out "$folder/$name.csr"
    printf 'subjectAltName=URI:%s\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n' \
        "$identity" >"$folder/$name.ext"
    openssl x509 -req -in "$folder/$name.csr" -CA "$folder/ca.pem" -CAkey "$folder/ca.key" -CAcreateserial -days 30 \
        -extfile "$folder/$name.ext" -out "$folder/$name.pem.new"
    # Both at their places only once both are there. Until the second is, the proxy finds that they do not fit, and
    # goes on with what it has.
    mv "$folder/$name.key.new" "$folder/$name.key"
    mv "$folder/$name.pem.new" "$folder/$name.pem"
    rm "$folder/$name.csr" "$folder/$name.ext"
    ;;
*) usage ;;
esac

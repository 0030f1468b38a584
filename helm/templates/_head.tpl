{{- define "m3serve.headGroup" -}}
{{- $head := .Values.head -}}
rayStartParams:
  dashboard-host: "0.0.0.0"
  # No replica is placed here.
  num-cpus: "0"
  num-gpus: "0"
  object-store-memory: {{ mul (int64 $head.objectStoreGiB) 1073741824 | quote }}
template:
  metadata:
    labels:
      {{- include "m3serve.podLabels" . | nindent 6 }}
      app.kubernetes.io/component: head
      {{- with $head.podLabels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with $head.podAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    {{- include "m3serve.podCommon" . | nindent 4 }}
    # The autoscaler runs beside Ray and speaks to the API server.
    automountServiceAccountToken: {{ .Values.autoscaling.enabled }}
    {{- with include "m3serve.scheduling" $head | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    containers:
      - name: ray-head
        image: {{ include "m3serve.image" . }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        env:
          {{- include "m3serve.env" . | nindent 10 }}
          {{- with $head.env }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        {{- with $head.envFrom }}
        envFrom:
          {{- toYaml . | nindent 10 }}
        {{- end }}
        ports:
          - containerPort: 6379
            name: gcs-server
          - containerPort: 8265
            name: dashboard
          - containerPort: 10001
            name: client
          {{- include "m3serve.servePorts" . | nindent 10 }}
        {{- with include "m3serve.probes" $head | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        securityContext:
          {{- toYaml .Values.containerSecurityContext | nindent 10 }}
        resources:
          {{- toYaml $head.resources | nindent 10 }}
        volumeMounts:
          - name: ray-tmp
            mountPath: /tmp/ray
          {{- with $head.volumeMounts }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
      {{- with $head.sidecars }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    volumes:
      - name: ray-tmp
        emptyDir: {}
      {{- with $head.volumes }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
{{- end -}}
